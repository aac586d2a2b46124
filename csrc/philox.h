// Philox4x32-10, the counter-based generator behind all noise of the package.
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// One counter for CUDA and plain C++, and vectors of neighbouring counters for the CPU kernels.
// The same in PyTorch: alitok_fast/ops/philox.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace alitok {

// Each user of the generator owns one value of the top two bits of counter word 0, so that under one seed no two
// users ever meet the same counter. The other 30 bits are the user's.
constexpr uint32_t kPhiloxSample = 0u << 30;
constexpr uint32_t kPhiloxDropout = 1u << 30;

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Philox4x32 {
  uint32_t word[4];
};

// Four random words for one counter; the 64 bits of `seed` are the key.
ALITOK_HOST_DEVICE Philox4x32 philox4x32(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * c0, p1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

#ifdef ALITOK_ISA
namespace ALITOK_ISA {

// `kPhiloxLanes` counters at once, one in each 32-bit lane. `PhiloxVec` is the instruction set's integer vector.
#if defined(__AVX512F__)
using PhiloxVec = __m512i;
constexpr int kPhiloxLanes = 16;

inline PhiloxVec philox_set(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline PhiloxVec philox_iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline PhiloxVec philox_add(PhiloxVec a, PhiloxVec b) { return _mm512_add_epi32(a, b); }
inline PhiloxVec philox_xor(PhiloxVec a, PhiloxVec b, PhiloxVec c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
inline void philox_multiply(PhiloxVec a, PhiloxVec b, PhiloxVec* low, PhiloxVec* high) {
  const __m512i even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  *low = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
  *high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
}
#elif defined(__AVX2__)
using PhiloxVec = __m256i;
constexpr int kPhiloxLanes = 8;

inline PhiloxVec philox_set(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline PhiloxVec philox_iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline PhiloxVec philox_add(PhiloxVec a, PhiloxVec b) { return _mm256_add_epi32(a, b); }
inline PhiloxVec philox_xor(PhiloxVec a, PhiloxVec b, PhiloxVec c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
inline void philox_multiply(PhiloxVec a, PhiloxVec b, PhiloxVec* low, PhiloxVec* high) {
  const __m256i even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
#else
using PhiloxVec = uint32_t;
constexpr int kPhiloxLanes = 1;

inline PhiloxVec philox_set(uint32_t x) { return x; }
inline PhiloxVec philox_iota() { return 0; }
inline PhiloxVec philox_add(PhiloxVec a, PhiloxVec b) { return a + b; }
inline PhiloxVec philox_xor(PhiloxVec a, PhiloxVec b, PhiloxVec c) { return a ^ b ^ c; }
inline void philox_multiply(PhiloxVec a, PhiloxVec b, PhiloxVec* low, PhiloxVec* high) {
  const uint64_t product = uint64_t{a} * b;
  *low = static_cast<uint32_t>(product);
  *high = static_cast<uint32_t>(product >> 32);
}
#endif

struct PhiloxWords {
  PhiloxVec word[4];
};

// Four random words for each counter (c0 in its lane, c1, c2, c3): lane i of `word[w]` is word w of counter i.
// `philox_add(philox_set(first), philox_iota())` makes neighbouring counters.
inline PhiloxWords philox4x32_lanes(uint64_t seed, PhiloxVec c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  const PhiloxVec multiplier0 = philox_set(kPhiloxMultiplier0), multiplier1 = philox_set(kPhiloxMultiplier1);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  PhiloxVec x0 = c0, x1 = philox_set(c1), x2 = philox_set(c2), x3 = philox_set(c3);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    PhiloxVec low0, high0, low1, high1;
    philox_multiply(x0, multiplier0, &low0, &high0);
    philox_multiply(x2, multiplier1, &low1, &high1);
    x0 = philox_xor(high1, x1, philox_set(k0));
    x1 = low1;
    x2 = philox_xor(high0, x3, philox_set(k1));
    x3 = low0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{x0, x1, x2, x3}};
}

// The 4 * kPhiloxLanes words of the counters first, first + 1, ..., each counter's four words one after the other.
inline void philox4x32_stream(uint64_t seed, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* out) {
#if defined(__AVX512F__)
  // The transpose below works within 128-bit groups: row t of group g becomes group g of vector t. With counter
  // 4 t + g there, the vectors come out in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const PhiloxWords w = philox4x32_lanes(seed, philox_add(philox_set(first), order), c1, c2, c3);
  const __m512i low01 = _mm512_unpacklo_epi32(w.word[0], w.word[1]),
                low23 = _mm512_unpacklo_epi32(w.word[2], w.word[3]);
  const __m512i high01 = _mm512_unpackhi_epi32(w.word[0], w.word[1]),
                high23 = _mm512_unpackhi_epi32(w.word[2], w.word[3]);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low01, low23));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(low01, low23));
  _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(high01, high23));
  _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(high01, high23));
#elif defined(__AVX2__)
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);  // as above, counter 2 t + g
  const PhiloxWords w = philox4x32_lanes(seed, philox_add(philox_set(first), order), c1, c2, c3);
  const __m256i low01 = _mm256_unpacklo_epi32(w.word[0], w.word[1]),
                low23 = _mm256_unpacklo_epi32(w.word[2], w.word[3]);
  const __m256i high01 = _mm256_unpackhi_epi32(w.word[0], w.word[1]),
                high23 = _mm256_unpackhi_epi32(w.word[2], w.word[3]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(low01, low23));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(low01, low23));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_unpacklo_epi64(high01, high23));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 24), _mm256_unpackhi_epi64(high01, high23));
#else
  const PhiloxWords w = philox4x32_lanes(seed, first, c1, c2, c3);
  memcpy(out, w.word, sizeof w.word);
#endif
}

}  // namespace ALITOK_ISA
#endif  // ALITOK_ISA

}  // namespace alitok
