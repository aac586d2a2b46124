// Products of bfloat16 matrices with float32 sums, in blocks, for many rows: by AMX tiles, by vdpbf16ps, or without
// either. <op>_cpu.cpp only.
//
// The left matrix lies in blocks of 32 rows, the right one in panels of 32 columns, both in steps of 32 along the depth.
// A step is two tiles of 1 KiB, as AMX reads them. A tile of the left matrix is 16 rows x 32 deep; one of the right matrix
// is 16 pairs x 16 columns, element (k, n) in half k % 2 of word (k / 2, n): as 32-bit words, each is the transpose of the
// other. What is missing to whole steps and panels is zero; what stands in missing rows is multiplied and not used.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "element.h"
#include "parallel.h"
#if defined(__AVX512BF16__)
#include "amx_multiply.h"
#endif

namespace alitok::ALITOK_ISA::bf16 {

constexpr int64_t kBlock = 32;  // rows of a block, columns of a panel, depth of a step
constexpr int64_t kHalf = 16;   // rows or columns of a tile
constexpr int64_t kTile = kHalf * kBlock;
constexpr int64_t kStep = 2 * kTile;

inline int64_t blocks_over(int64_t n) { return (n + kBlock - 1) / kBlock; }

// How many left blocks of so many elements stay in the second-level cache, 1 MiB of it.
constexpr int64_t kMostBlocks = 16;
inline int64_t blocks_at_a_time(int64_t elements) {
  return std::clamp<int64_t>((int64_t{1} << 19) / std::max<int64_t>(elements, 1), 2, kMostBlocks);
}

// Steps of a panel that meet all blocks before the next ones are fetched: the whole of a longer panel would come from the
// second-level cache again for each block. Fewer were no faster.
constexpr int64_t kStepsAtATime = 24;

// ---- packing ----

// That all 32 elements are there, as a constant: loads then need no masks.
struct All {
  constexpr operator int64_t() const { return kBlock; }
};

#if defined(__AVX512BF16__)

inline __mmask32 first_of_32(int64_t count) {
  return count >= kBlock ? 0xFFFFFFFFu : (1u << std::max<int64_t>(count, 0)) - 1;
}

// Elements 0 .. count - 1 rounded to bfloat16, and zeros up to 32.
inline __m512i load_32(const uint16_t* x, All) { return _mm512_loadu_si512(x); }
inline __m512i load_32(const uint16_t* x, int64_t count) { return _mm512_maskz_loadu_epi16(first_of_32(count), x); }
inline __m512i load_32(const float* x, All) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
}
inline __m512i load_32(const float* x, int64_t count) {
  const __mmask32 mask = first_of_32(count);
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

inline void transpose_words(__m512i (&rows)[16]) {
  Vec lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = _mm512_castsi512_ps(rows[i]);
  transpose(lanes);
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castps_si512(lanes[i].v);
}

// A step of the left or right matrix, from a source of which `outer` rows or columns of the matrix and `depth` are there.
// `Along`: a row of the source is one depth; else it is one row or column of the matrix.
template <bool Left, bool Along, class T, class Count>
void pack_step(const T* x, int64_t stride, Count outer, Count depth, uint16_t* step) {
  const auto load = [&](int64_t row, int64_t rows, Count columns) {
    const T* at = x + row * stride;
    return row < rows ? load_32(at, columns) : _mm512_setzero_si512();
  };
  const __m512i low_lanes = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high_lanes = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int tile = 0; tile < 2; ++tile) {
    __m512i words[16];
    for (int64_t i = 0; i < kHalf; ++i) {
      if constexpr (Along) {  // two rows of the source, their elements in turn
        const __m512i even = load(2 * i, depth, outer), odd = load(2 * i + 1, depth, outer);
        words[i] = _mm512_permutex2var_epi64(_mm512_unpacklo_epi16(even, odd), tile == 0 ? low_lanes : high_lanes,
                                             _mm512_unpackhi_epi16(even, odd));
      } else {
        words[i] = load(tile * kHalf + i, outer, depth);
      }
    }
    if constexpr (Left == Along) transpose_words(words);
    for (int64_t i = 0; i < kHalf; ++i) _mm512_store_si512(step + tile * kTile + i * kBlock, words[i]);
  }
}

#else

inline uint16_t as_bf16(uint16_t x) { return x; }
inline uint16_t as_bf16(float x) { return to_bf16(x); }

template <bool Left, bool Along, class T, class Count>
void pack_step(const T* x, int64_t stride, Count outer, Count depth, uint16_t* step) {
  std::memset(step, 0, kStep * sizeof(uint16_t));
  for (int64_t o = 0; o < std::min<int64_t>(outer, kBlock); ++o)
    for (int64_t k = 0; k < std::min<int64_t>(depth, kBlock); ++k) {
      const int64_t within = Left ? o % kHalf * kBlock + k : k / 2 * kBlock + o % kHalf * 2 + k % 2;
      step[o / kHalf * kTile + within] = as_bf16(x[Along ? k * stride + o : o * stride + k]);
    }
}

#endif

// Row r of a left block, all of its depth.
template <class T>
void pack_row(const T* x, int64_t depth, int64_t r, uint16_t* steps) {
  for (int64_t k = 0; k < depth; k += kBlock, steps += kStep) {
#if defined(__AVX512BF16__)
    const __m512i words = depth - k >= kBlock ? load_32(x + k, All{}) : load_32(x + k, depth - k);
    _mm512_store_si512(steps + r * kBlock, words);
#else
    for (int64_t i = 0; i < kBlock; ++i) steps[r * kBlock + i] = k + i < depth ? as_bf16(x[k + i]) : uint16_t{0};
#endif
  }
}

// A whole block or panel: `outer` rows or columns from x on, all of the depth.
template <bool Left, bool Along, class T>
void pack_steps(const T* x, int64_t stride, int64_t outer, int64_t depth, uint16_t* steps) {
  for (int64_t k = 0; k < depth; k += kBlock, steps += kStep) {
    const T* at = x + (Along ? k * stride : k);
    if (outer >= kBlock && depth - k >= kBlock) {
      pack_step<Left, Along>(at, stride, All{}, All{}, steps);
    } else {
      pack_step<Left, Along>(at, stride, outer, depth - k, steps);
    }
  }
}

// ---- multiplying ----

// Each has `Setup`, which a thread constructs before it calls `multiply`: the product of a block and a panel, both of
// `steps` steps, as (kBlock, kBlock) float32, or added to what is there (Accumulate). `between(row)` is called for each of
// kBlock rows: what is to be done with the product before, which other units of the processor do while the tiles multiply.

struct PlainBlocks {
  struct Setup {};
  template <bool Accumulate, class F>
  static void multiply(const uint16_t* block, const uint16_t* panel, int64_t steps, float* product, const F& between) {
    for (int64_t r = 0; r < kBlock; ++r) between(r);
    if constexpr (!Accumulate) std::fill(product, product + kBlock * kBlock, 0.0f);
    for (int64_t step = 0; step < steps; ++step, block += kStep, panel += kStep)
      for (int64_t r = 0; r < kBlock; ++r) {
        const uint16_t* row = block + r * kBlock;  // its two tiles lie one after the other
        for (int64_t tile = 0; tile < 2; ++tile)
          for (int64_t q = 0; q < kHalf; ++q) {
            const float even = from_bf16(row[2 * q]), odd = from_bf16(row[2 * q + 1]);
            const uint16_t* pairs = panel + tile * kTile + q * kBlock;
            float* sum = product + r * kBlock + tile * kHalf;
            for (int64_t n = 0; n < kHalf; ++n)
              sum[n] += even * from_bf16(pairs[2 * n]) + odd * from_bf16(pairs[2 * n + 1]);
          }
      }
  }
};

#if defined(__AVX512BF16__)

struct DotBlocks {
  struct Setup {};
  template <bool Accumulate, class F>
  static void multiply(const uint16_t* block, const uint16_t* panel, int64_t steps, float* product, const F& between) {
    for (int64_t r = 0; r < kBlock; ++r) between(r);
    for (int64_t r = 0; r < kBlock; r += 8)
      eight_rows<Accumulate>(block + r * kBlock, panel, steps, product + r * kBlock);
  }

 private:
  template <bool Accumulate>
  static void eight_rows(const uint16_t* rows, const uint16_t* panel, int64_t steps, float* product) {
    __m512 sum[8][2];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      sum[r][0] = Accumulate ? _mm512_loadu_ps(product + r * kBlock) : _mm512_setzero_ps();
      sum[r][1] = Accumulate ? _mm512_loadu_ps(product + r * kBlock + kHalf) : _mm512_setzero_ps();
    }
    for (int64_t step = 0; step < steps; ++step, rows += kStep, panel += kStep)
      for (int64_t q = 0; q < kHalf; ++q) {
        const auto low = (__m512bh)_mm512_load_si512(panel + q * kBlock);
        const auto high = (__m512bh)_mm512_load_si512(panel + kTile + q * kBlock);
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
          int32_t pair;
          std::memcpy(&pair, rows + r * kBlock + 2 * q, sizeof pair);
          const auto both = (__m512bh)_mm512_set1_epi32(pair);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], both, low);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], both, high);
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      _mm512_storeu_ps(product + r * kBlock, sum[r][0]);
      _mm512_storeu_ps(product + r * kBlock + kHalf, sum[r][1]);
    }
  }
};

struct AmxBlocks {
  using Setup = AmxTiles;
  template <bool Accumulate, class F>
  ALITOK_AMX static void multiply(const uint16_t* block, const uint16_t* panel, int64_t steps, float* product,
                                  const F& between) {
    int64_t row = 0;
    constexpr int64_t kRow = 64, kProductRow = kBlock * sizeof(float);
    asm volatile("" ::: "memory");  // the tile loads below do not tell the compiler what they read
    if constexpr (Accumulate) {
      _tile_loadd(0, product, kProductRow);
      _tile_loadd(1, product + kHalf, kProductRow);
      _tile_loadd(2, product + kHalf * kBlock, kProductRow);
      _tile_loadd(3, product + kHalf * kBlock + kHalf, kProductRow);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, block += kStep, panel += kStep) {
      _tile_stream_loadd(4, block, kRow);  // leaves the panel, which the next block meets too, in the first-level cache
      _tile_loadd(6, panel, kRow);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, panel + kTile, kRow);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(5, block + kTile, kRow);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      for (; row < kBlock && row * steps < (step + 1) * kBlock; ++row) between(row);
    }
    for (; row < kBlock; ++row) between(row);
    _tile_stored(0, product, kProductRow);
    _tile_stored(1, product + kHalf, kProductRow);
    _tile_stored(2, product + kHalf * kBlock, kProductRow);
    _tile_stored(3, product + kHalf * kBlock + kHalf, kProductRow);
    asm volatile("" ::: "memory");  // nor the stores what they write
  }
};

#endif

// The products of blocks `begin` to `end`, at most kMostBlocks, with a panel: `block(i)` gives a block, `store(i, row,
// products)` gets each row of its product. All blocks meet a part of the panel's depth before the next part is fetched.
template <class Blocks, class Block, class Store>
void multiply_each(int64_t begin, int64_t end, const uint16_t* panel, int64_t steps, const Block& block,
                   const Store& store) {
  alignas(64) float products[kMostBlocks][kBlock * kBlock];
  const int64_t part = even_parts(steps, kStepsAtATime);
  const auto product = [&](int64_t i) { return products[part < steps ? i - begin : i % 2]; };
  int64_t first = 0;
  do {
    const int64_t count = std::min(part, steps - first);
    for (int64_t i = begin; i < end; ++i) {
      const auto between = [&](int64_t r) {
        if (first + count == steps && i > begin) store(i - 1, r, product(i - 1) + r * kBlock);
      };
      const uint16_t *left = block(i) + first * kStep, *right = panel + first * kStep;
      if (first == 0) {
        Blocks::template multiply<false>(left, right, count, product(i), between);
      } else {
        Blocks::template multiply<true>(left, right, count, product(i), between);
      }
    }
    first += count;
  } while (first < steps);
  for (int64_t r = 0; r < kBlock && begin < end; ++r) store(end - 1, r, product(end - 1) + r * kBlock);
}

// f.run<Blocks>() with the fastest of them that this machine has.
template <class F>
void with_blocks(const F& f) {
#if defined(__AVX512BF16__)
  return cpu_has_amx() ? f.template run<AmxBlocks>() : f.template run<DotBlocks>();
#else
  return f.template run<PlainBlocks>();
#endif
}

}  // namespace alitok::ALITOK_ISA::bf16
