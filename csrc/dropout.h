// Dropout by counter: whether an element of a matrix is dropped is a function of (seed, head, row, column), the same
// in the CPU and CUDA kernels and in alitok_fast/ops/dropout.py.
//
// It is dropped where its 16 random bits are below the threshold. Bits: half part % 2 (0 is the low one) of word
// part / 2, part = column % 128 / 16, of Philox4x32-10 with key (seed low, seed high) and counter
// (kPhiloxDropout + column / 128 * 16 + column % 16, row, head, 0). So sixteen neighbouring counters serve 128
// neighbouring columns, in vector registers and without a transpose.
#pragma once

#include <cstdint>

#include "philox.h"
#ifdef ALITOK_ISA
#include "simd.h"
#endif

namespace alitok {

struct Dropout {
  uint32_t threshold;   // probability in 1 / 65536; 0: no dropout
  float scale;          // 1 / (1 - threshold / 65536), on what is kept
  const int64_t* seed;  // one element, on the device of the tensors; null without dropout
};

constexpr int64_t kDropoutColumns = 128;  // that sixteen counters serve

// Bit q of the result: column 128 group + 16 q + c is kept.
ALITOK_HOST_DEVICE unsigned dropout_bits(uint64_t seed, uint32_t threshold, uint32_t head, uint32_t row, uint32_t group,
                                         uint32_t c) {
  const Philox4x32 random = philox4x32(seed, kPhiloxDropout + group * 16 + c, row, head, 0);
  unsigned bits = 0;
#ifdef __CUDA_ARCH__  // the host compiler does not know the pragma
#pragma unroll
#endif
  for (int w = 0; w < 4; ++w) {
    const uint32_t word = random.word[w];
    if ((word & 0xffffu) >= threshold) bits |= 1u << 2 * w;
    if (word >> 16 >= threshold) bits |= 2u << 2 * w;
  }
  return bits;
}

#ifdef ALITOK_ISA
namespace ALITOK_ISA {

// Where 16 bits of each word, its low or its high half, are not below the threshold: scale. Elsewhere 0.
inline Vec keep_scaled(PhiloxVec words, bool high, uint32_t threshold, float scale) {
#if defined(__AVX512F__)
  const __m512i random = high ? _mm512_srli_epi32(words, 16) : _mm512_and_si512(words, philox_set(0xFFFF));
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(random, philox_set(threshold)), _mm512_set1_ps(scale));
#elif defined(__AVX2__)
  const __m256i random = high ? _mm256_srli_epi32(words, 16) : _mm256_and_si256(words, philox_set(0xFFFF));
  const __m256i dropped = _mm256_cmpgt_epi32(philox_set(threshold), random);
  return _mm256_andnot_ps(_mm256_castsi256_ps(dropped), _mm256_set1_ps(scale));
#else
  return (high ? words >> 16 : words & 0xFFFF) < threshold ? 0.0f : scale;
#endif
}

// For columns 0 .. columns - 1 of a row, and on to a multiple of kDropoutColumns: 0 where dropout strikes, else scale.
inline void dropout_factors(uint64_t seed, uint32_t threshold, float scale, uint32_t head, uint32_t row,
                            int64_t columns, float* factors) {
  static_assert(kPhiloxLanes == Vec::lanes, "one factor for each counter");
  for (int64_t j = 0; j < columns; j += kDropoutColumns)
    for (int64_t lane = 0; lane < 16; lane += Vec::lanes) {
      const auto first = static_cast<uint32_t>(kPhiloxDropout + j / 8 + lane);
      const PhiloxWords random = philox4x32_lanes(seed, philox_add(philox_set(first), philox_iota()), row, head, 0);
      for (int part = 0; part < 8; ++part)
        keep_scaled(random.word[part / 2], part % 2 == 1, threshold, scale).store(factors + j + part * 16 + lane);
    }
}

}  // namespace ALITOK_ISA
#endif  // ALITOK_ISA

}  // namespace alitok
