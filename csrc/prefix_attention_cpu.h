// What forward and backward of prefix_attention on the CPU share: rows of the tensors as attention sees them, working
// memory, probabilities of a row.
//
// One task per (batch, head). Keys and values of a head are normalised, rotated and packed once (they fit the L2 cache); a
// tile of query rows then meets all keys it sees, so that the softmax is over complete rows and only a tile of scores ever
// exists. All products are float32, but for those of bfloat16 with AMX or AVX-512 BF16.
#pragma once

#include "prefix_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "scratch.h"
#include "simd.h"
#include "tile_multiply.h"
#if defined(__AVX512BF16__)
#include "amx_multiply.h"
#include "dot_multiply.h"
#endif

namespace alitok::ALITOK_ISA {
namespace {  // a copy for each of the two files

constexpr int64_t kLanes = Vec::lanes;
constexpr int64_t kTile = 24;  // query rows of one tile: a multiple of every register block of tile_multiply.h

enum Part { kQuery, kKey, kValue };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The first `count` of a vector's lanes, at most all; the others read as zero and are not written.
Vec load_first(const float* p, int64_t count) { return count >= kLanes ? Vec::load(p) : Vec::load(p, int(count)); }
Vec load_first(const bfloat16* p, int64_t count) {
  return count >= kLanes ? Vec::load_bf16(&p->bits) : Vec::load_bf16(&p->bits, int(count));
}
Vec load_first(const float16* p, int64_t count) {
  return count >= kLanes ? Vec::load_f16(&p->bits) : Vec::load_f16(&p->bits, int(count));
}
void store_first(Vec x, float* p, int64_t count) { count >= kLanes ? x.store(p) : x.store(p, int(count)); }
void store_first(Vec x, bfloat16* p, int64_t count) {
  count >= kLanes ? x.store_bf16(&p->bits) : x.store_bf16(&p->bits, int(count));
}
void store_first(Vec x, float16* p, int64_t count) {
  count >= kLanes ? x.store_f16(&p->bits) : x.store_f16(&p->bits, int(count));
}

template <class T>
Vec round_to(Vec x) {
  if constexpr (std::is_same_v<T, float>) return x;
  T rounded[kLanes];
  store_first(x, rounded, kLanes);
  return load_first(rounded, kLanes);
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t vectors_over(int64_t n) { return (n + kLanes - 1) / kLanes; }

// Row lengths of the working memory, in floats: whole cache lines, so whole vectors too. Between rows over all keys
// lies an odd number of lines, which keeps a column of them out of a single cache set.
struct Layout {
  static constexpr int64_t kLine = 16;
  int64_t row;   // a row over the head dimension
  int64_t keys;  // a row over all keys

  explicit Layout(const PrefixAttentionParams& p, int64_t multiple = kLine)
      : row(round_up(p.head_dim, multiple)), keys((round_up(p.length, multiple) / kLine | 1) * kLine) {}
  int64_t row_vectors() const { return row / kLanes; }
  int64_t per_key() const { return keys * row; }  // both (keys, row) and its transpose
  int64_t factors() const { return round_up(keys, kDropoutColumns); }
};

// How many keys position i sees: the first so many.
int64_t visible_keys(const PrefixAttentionParams& p, int64_t i) { return std::max(p.prefix_len, i + 1); }

// The rows (head_dim) of one head in some tensor: row i at first + i * stride. They lie so far apart that the processor
// does not fetch the next ones by itself.
template <class T>
struct Rows {
  T* first;
  int64_t stride;
  T* operator[](int64_t i) const { return first + i * stride; }
  void fetch(int64_t i, int64_t row_size) const {
    const auto* row = reinterpret_cast<const char*>(first + i * stride);
    for (int64_t byte = 0; byte < row_size * static_cast<int64_t>(sizeof(T)); byte += 64)
      __builtin_prefetch(row + byte);
  }
};
constexpr int64_t kAhead = 12;  // rows that are fetched before they are needed

template <class T>
Rows<const T> input_rows(const PrefixAttentionParams& p, int64_t head, Part part) {
  const int64_t b = head / p.heads, h = head % p.heads;
  return {static_cast<const T*>(p.qkv) + b * p.qkv_batch_stride + (part * p.heads + h) * p.head_dim, p.qkv_row_stride};
}

// Of a contiguous (B, L, H, D) tensor.
template <class T, class Data>
Rows<T> output_rows(const PrefixAttentionParams& p, int64_t head, Data* data) {
  const int64_t b = head / p.heads, h = head % p.heads, stride = p.heads * p.head_dim;
  return {static_cast<T*>(data) + b * p.length * stride + h * p.head_dim, stride};
}

const float* norm_weight(const PrefixAttentionParams& p, Part part) {
  return part == kQuery ? p.q_norm_weight : part == kKey ? p.k_norm_weight : nullptr;
}

float inverse_rms(const PrefixAttentionParams& p, Vec squares) {
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(p.head_dim) + p.norm_eps);
}

// Turns each pair (y0, y1) of a row by its (cosine, sine), or back, and rounds to T.
template <class T>
void rotate_row(float* y, const float* turn, int64_t n, bool back) {
#if defined(__AVX2__)
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vec pairs = Vec::load(y + d), turns = load_first(turn + d, n - d);
    round_to<T>(back ? rotate_pairs_back(pairs, turns) : rotate_pairs(pairs, turns)).store(y + d);
  }
#else
  for (int64_t d = 0; d < n; d += 2) {
    const float y0 = y[d], y1 = y[d + 1], cosine = turn[d], sine = back ? -turn[d + 1] : turn[d + 1];
    round_to<T>(y0 * cosine - y1 * sine).store(y + d);
    round_to<T>(y0 * sine + y1 * cosine).store(y + d + 1);
  }
#endif
}

// A row as attention sees it, in whole vectors with zeros beyond head_dim: a query or key normalised and rotated,
// rounded to T after each. Out is float, or T itself, which loses nothing more.
template <class T, class Out>
void prepare_row(const PrefixAttentionParams& p, const T* x, Part part, int64_t i, Out* y) {
  const int64_t n = p.head_dim;
  const float* weight = norm_weight(p, part);
  const float* rope = part == kValue || p.rope == nullptr ? nullptr : p.rope + i * n;
  Vec rstd;
  if (weight != nullptr) {
    Vec squares;
    for (int64_t d = 0; d < n; d += kLanes) {
      const Vec element = load_first(x + d, n - d);
      squares = fma(element, element, squares);
    }
    rstd = inverse_rms(p, squares);
  }
  for (int64_t d = 0; d < n; d += kLanes) {
    Vec element = load_first(x + d, n - d);
    if (weight != nullptr) {
      element = round_to<T>(round_to<T>(element * rstd) * round_to<T>(load_first(weight + d, n - d)));
    }
#if defined(__AVX2__)
    if (rope != nullptr) element = round_to<T>(rotate_pairs(element, load_first(rope + d, n - d)));
#endif
    store_first(element, y + d, kLanes);
  }
#if !defined(__AVX2__)  // a single lane holds no pair
  if (rope != nullptr) rotate_row<T>(y, rope, n, false);
#endif
}

// Rows i0..i0 + count of a head: (count, row).
template <class T, class Out>
void prepare_rows(const PrefixAttentionParams& p, const Layout& layout, int64_t head, Part part, int64_t i0,
                  int64_t count, Out* rows) {
  const Rows<const T> input = input_rows<T>(p, head, part);
  for (int64_t i = i0; i < i0 + count; ++i) {
    input.fetch(std::min(i + kAhead, p.length - 1), p.head_dim);
    prepare_row(p, input[i], part, i, rows + (i - i0) * layout.row);
  }
}

// (rows, columns) -> (columns, rows), of any 32-bit words; rows and columns are multiples of a vector's lanes.
void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) block[r] = Vec::load(from + (i + r) * from_stride + j);
      transpose(block);
      for (int64_t r = 0; r < kLanes; ++r) block[r].store(to + (j + r) * to_stride + i);
    }
}

// The dropout factors of row i of the probabilities.
void row_factors(const PrefixAttentionParams& p, int64_t head, int64_t i, int64_t keys, float* factors) {
  dropout_factors(static_cast<uint64_t>(*p.dropout.seed), p.dropout.threshold, p.dropout.scale,
                  static_cast<uint32_t>(head), static_cast<uint32_t>(i), keys, factors);
}

struct NoSetup {};  // what a thread constructs before it works, where it needs nothing

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// f(v, count) for each vector of which keys are visible, count of its lanes: a constant for all but the last one, so that
// loads need no masks. Then rest(v) for the vectors up to `vectors`.
template <class F, class Rest>
void over_keys(int64_t visible, int64_t vectors, const F& f, const Rest& rest) {
  const int64_t whole = visible / kLanes;
  for (int64_t v = 0; v < whole; ++v) f(v, std::integral_constant<int, kLanes>{});
  int64_t v = whole;
  if (visible > whole * kLanes) f(v++, static_cast<int>(visible - whole * kLanes));
  for (; v < vectors; ++v) rest(v);
}

#if defined(__AVX512BF16__)
// Products of bfloat16, which two kinds of instructions sum in float32. kBlock: what columns and depth of a product are a
// multiple of; kRowBlock: its rows.
struct AmxProducts {
  static constexpr int64_t kTileRows = kAmxBlock, kRowBlock = kAmxBlock, kBlock = kAmxBlock;
  template <bool Accumulate = false, class... Args>
  static void multiply(Args... args) {
    multiply_amx<Accumulate>(args...);
  }
  AmxTiles tiles;
};
struct DotProducts {
  static constexpr int64_t kTileRows = kTile, kRowBlock = 1, kBlock = kLanes;
  template <bool Accumulate = false, class... Args>
  static void multiply(Args... args) {
    multiply_dot<Accumulate>(args...);
  }
};

bfloat16* as_bfloat16(float* data) { return reinterpret_cast<bfloat16*>(data); }

// (2 pairs, row) bfloat16 -> (pairs, row) words, each of two rows' elements.
void pair_rows(int64_t pairs, int64_t row, const bfloat16* rows, float* words) {
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t d = 0; d < row; d += kLanes) {
      const auto* low = reinterpret_cast<const __m256i*>(rows + 2 * pair * row + d);
      const auto* high = reinterpret_cast<const __m256i*>(rows + (2 * pair + 1) * row + d);
      const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_loadu_si256(low)),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(high)), 16));
      _mm512_storeu_si512(words + pair * row + d, both);
    }
}
#endif

}  // namespace
}  // namespace alitok::ALITOK_ISA
