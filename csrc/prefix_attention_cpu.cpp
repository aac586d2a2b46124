// prefix_attention on CPU: one task per (batch, head). Keys and values of a head are normalised, rotated and packed
// once (they fit the L2 cache); a tile of query rows then meets all keys it sees, so that the softmax is over complete
// rows and only a tile of scores ever exists. All products are float32, but for the forward pass of bfloat16 with AMX or
// AVX-512 BF16.
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
namespace {

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

// The rows (head_dim) of one head in some tensor: row i at first + i * stride.
template <class T>
struct Rows {
  T* first;
  int64_t stride;
  T* operator[](int64_t i) const { return first + i * stride; }
};

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

// The gradient of a prepared row back through rotation and norm: writes the gradient of the input
// row, adds to that of the weight. Roundings count as identity. `grad` is overwritten; both end in whole vectors.
template <class T>
void backward_row(const PrefixAttentionParams& p, const T* x, Part part, int64_t i, float* grad, float* grad_weight,
                  T* grad_x) {
  const int64_t n = p.head_dim;
  const float* weight = norm_weight(p, part);
  const float* rope = part == kValue || p.rope == nullptr ? nullptr : p.rope + i * n;
  if (rope != nullptr) rotate_row<float>(grad, rope, n, true);
  Vec squares, along;
  if (weight != nullptr) {
    for (int64_t d = 0; d < n; d += kLanes) {
      const Vec element = load_first(x + d, n - d);
      squares = fma(element, element, squares);
    }
    const Vec rstd = inverse_rms(p, squares);
    for (int64_t d = 0; d < n; d += kLanes) {
      const Vec normed = load_first(x + d, n - d) * rstd, above = Vec::load(grad + d);
      fma(above, round_to<T>(normed), Vec::load(grad_weight + d)).store(grad_weight + d);
      const Vec below = above * round_to<T>(load_first(weight + d, n - d));
      along = fma(below, normed, along);
      below.store(grad + d);
    }
    const Vec mean = sum(along) / static_cast<float>(n);
    for (int64_t d = 0; d < n; d += kLanes) {
      const Vec normed = load_first(x + d, n - d) * rstd;
      (rstd * fnma(mean, normed, Vec::load(grad + d))).store(grad + d);
    }
  }
  for (int64_t d = 0; d < n; d += kLanes) store_first(Vec::load(grad + d), grad_x + d, n - d);
}

// Rows i0..i0 + count of a head: (count, row).
template <class T, class Out>
void prepare_rows(const PrefixAttentionParams& p, const Layout& layout, int64_t head, Part part, int64_t i0,
                  int64_t count, Out* rows) {
  const Rows<const T> input = input_rows<T>(p, head, part);
  for (int64_t i = i0; i < i0 + count; ++i) prepare_row(p, input[i], part, i, rows + (i - i0) * layout.row);
}

// (keys, width) -> (width, keys), of any 32-bit words.
void transpose(const Layout& layout, int64_t width, const float* rows, float* columns) {
  for (int64_t j = 0; j < layout.keys; j += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) block[r] = Vec::load(rows + (j + r) * width + d);
      transpose(block);
      for (int64_t r = 0; r < kLanes; ++r) block[r].store(columns + (d + r) * layout.keys + j);
    }
}

// The dropout factors of row i of the probabilities.
void row_factors(const PrefixAttentionParams& p, int64_t head, int64_t i, int64_t keys, float* factors) {
  dropout_factors(static_cast<uint64_t>(*p.dropout.seed), p.dropout.threshold, p.dropout.scale,
                  static_cast<uint32_t>(head), static_cast<uint32_t>(i), keys, factors);
}

// Vector v of a row of logits: scaled products, and -infinity (probability zero) for keys that are not visible.
// Hidden in the register: written to memory, the next load would wait for two overlapping stores.
Vec visible_logits(const float* products, float scale, int64_t v, int64_t visible) {
  const Vec all = Vec::load(products + v * kLanes) * Vec(scale);
  const int64_t count = visible - v * kLanes;
  return count >= kLanes ? all : first_lanes(all, Vec(-INFINITY), static_cast<int>(std::max<int64_t>(count, 0)));
}

// Rows of products become probabilities times row sum, after dropout, over whole `vectors`; writes the log-sum-exp.
// `probabilities` may be the products themselves; rows of both are layout.keys elements apart.
template <class Out>
void softmax_rows(const PrefixAttentionParams& p, const Layout& layout, int64_t head, int64_t i0, int64_t rows,
                  int64_t vectors, const float* products, Out* probabilities, float* factors, float* inverse_sum) {
  const bool dropout = p.dropout.threshold > 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* in = products + r * layout.keys;
    Out* out = probabilities + r * layout.keys;
    const int64_t i = i0 + r, visible = visible_keys(p, i);
    if (dropout) row_factors(p, head, i, visible, factors);
    Vec top = visible_logits(in, p.scale, 0, visible);
    for (int64_t v = 1; v < vectors; ++v) top = max(top, visible_logits(in, p.scale, v, visible));
    const float row_max = max(top);
    Vec total;
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec e = exp(visible_logits(in, p.scale, v, visible) - Vec(row_max));
      total += e;
      store_first(dropout ? e * Vec::load(factors + v * kLanes) : e, out + v * kLanes, kLanes);
    }
    const float row_sum = sum(total);
    inverse_sum[r] = 1.0f / row_sum;
    p.lse[head * p.length + i] = row_max + std::log(row_sum);
  }
}

template <class T>
void write_rows(const PrefixAttentionParams& p, const Layout& layout, int64_t head, int64_t i0, int64_t rows,
                const float* sums, const float* inverse_sum) {
  const Rows<T> out = output_rows<T>(p, head, p.out);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < p.head_dim; d += kLanes)
      store_first(Vec::load(sums + r * layout.row + d) * Vec(inverse_sum[r]), out[i0 + r] + d, p.head_dim - d);
}

struct ForwardBuffers {
  FloatBuffer keys, keys_t, values, q, scores, out, factors;
  explicit ForwardBuffers(const Layout& layout)
      : keys(layout.per_key()),
        keys_t(layout.per_key()),
        values(layout.per_key()),
        q(kTile * layout.row),
        scores(kTile * layout.keys),
        out(kTile * layout.row),
        factors(layout.factors()) {}
  void zero() {
    for (FloatBuffer* buffer : {&keys, &keys_t, &values, &q, &scores, &out, &factors}) buffer->zero();
  }
};

template <class T>
void prepare_head(const PrefixAttentionParams& p, const Layout& layout, int64_t head, ForwardBuffers& buffers) {
  prepare_rows<T>(p, layout, head, kKey, 0, p.length, +buffers.keys);
  prepare_rows<T>(p, layout, head, kValue, 0, p.length, +buffers.values);
  transpose(layout, layout.row, buffers.keys, buffers.keys_t);
}

template <class T>
void forward_tile(const PrefixAttentionParams& p, const Layout& layout, int64_t head, int64_t i0,
                  ForwardBuffers& buffers) {
  const int64_t rows = std::min(kTile, p.length - i0), keys = visible_keys(p, i0 + rows - 1);
  float inverse_sum[kTile];
  prepare_rows<T>(p, layout, head, kQuery, i0, rows, +buffers.q);
  multiply(rows, vectors_over(keys), p.head_dim, row_major(buffers.q, layout.row), buffers.keys_t, layout.keys,
           buffers.scores, layout.keys);
  softmax_rows(p, layout, head, i0, rows, vectors_over(keys), buffers.scores, +buffers.scores, buffers.factors,
               inverse_sum);
  multiply(rows, layout.row_vectors(), keys, row_major(buffers.scores, layout.keys), buffers.values, layout.row,
           buffers.out, layout.row);
  write_rows<T>(p, layout, head, i0, rows, buffers.out, inverse_sum);
}

// Calls `prepare(head)` and then `tile(head, first row)` for all tiles of all heads, on all threads, each with buffers
// of its own, after the constructor of a ThreadSetup. Few heads for many threads: several tasks share the tiles of a
// head, and each prepares for itself.
struct NoSetup {};
template <class Buffers, class ThreadSetup = NoSetup, class Prepare, class Tile>
void for_all_tiles(const PrefixAttentionParams& p, const Layout& layout, int64_t tile_rows, const Parallel& parallel,
                   const Prepare& prepare, const Tile& tile) {
  const int64_t heads = p.batch * p.heads, tiles = (p.length + tile_rows - 1) / tile_rows;
  const int64_t parts = std::min(tiles, std::max<int64_t>(1, 2 * parallel.threads / heads));
  Scratch<Buffers> scratch(parallel, heads * parts, layout);
  parallel(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] ThreadSetup setup{};
    Buffers& buffers = scratch.take();
    buffers.zero();
    for (int64_t task = begin; task < end; ++task) {
      prepare(task / parts, buffers);
      for (int64_t t = task % parts; t < tiles; t += parts) tile(task / parts, t * tile_rows, buffers);
    }
  });
}

#if defined(__AVX512BF16__)
// The same for bfloat16, whose products two kinds of instructions sum in float32; probabilities are rounded to bfloat16.
// kBlock: what columns and depth of a product are a multiple of; kRowBlock: its rows.
struct AmxProducts {
  static constexpr int64_t kTileRows = kAmxBlock, kRowBlock = kAmxBlock, kBlock = kAmxBlock;
  static constexpr auto multiply = multiply_amx;
  AmxTiles tiles;
};
struct DotProducts {
  static constexpr int64_t kTileRows = kTile, kRowBlock = 1, kBlock = kLanes;
  static constexpr auto multiply = multiply_dot;
};

template <class Products>
struct PairBuffers {
  FloatBuffer keys, keys_t, values, value_pairs, q, products, probabilities, out, factors;
  explicit PairBuffers(const Layout& layout)
      : keys(layout.per_key() / 2),
        keys_t(layout.per_key() / 2),
        values(layout.per_key() / 2),
        value_pairs(layout.per_key() / 2),
        q(Products::kTileRows * layout.row / 2),
        products(Products::kTileRows * layout.keys),
        probabilities(Products::kTileRows * layout.keys / 2),
        out(Products::kTileRows * layout.row),
        factors(layout.factors()) {}
  void zero() {
    for (FloatBuffer* buffer : {&keys, &keys_t, &values, &value_pairs, &q, &products, &probabilities, &out, &factors})
      buffer->zero();
  }
};

bfloat16* as_bfloat16(float* data) { return reinterpret_cast<bfloat16*>(data); }

template <class Products>
void prepare_head_pairs(const PrefixAttentionParams& p, const Layout& layout, int64_t head,
                        PairBuffers<Products>& buffers) {
  prepare_rows<bfloat16>(p, layout, head, kKey, 0, p.length, as_bfloat16(buffers.keys));
  transpose(layout, layout.row / 2, buffers.keys, buffers.keys_t);  // pairs along the head dimension
  prepare_rows<bfloat16>(p, layout, head, kValue, 0, p.length, as_bfloat16(buffers.values));
  const bfloat16* values = as_bfloat16(buffers.values);
  for (int64_t pair = 0; pair < (p.length + 1) / 2; ++pair)
    for (int64_t d = 0; d < layout.row; d += kLanes) {
      const auto* low = reinterpret_cast<const __m256i*>(values + 2 * pair * layout.row + d);
      const auto* high = reinterpret_cast<const __m256i*>(values + (2 * pair + 1) * layout.row + d);
      const __m512i words = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_loadu_si256(low)),
                                            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(high)), 16));
      _mm512_storeu_si512(buffers.value_pairs + pair * layout.row + d, words);
    }
}

template <class Products>
void forward_tile_pairs(const PrefixAttentionParams& p, const Layout& layout, int64_t head, int64_t i0,
                        PairBuffers<Products>& buffers) {
  const int64_t rows = std::min(Products::kTileRows, p.length - i0), all_rows = round_up(rows, Products::kRowBlock);
  const int64_t keys = round_up(visible_keys(p, i0 + rows - 1), Products::kBlock);
  const int64_t dim = round_up(p.head_dim, Products::kBlock);
  float inverse_sum[Products::kTileRows];
  prepare_rows<bfloat16>(p, layout, head, kQuery, i0, rows, as_bfloat16(buffers.q));
  Products::multiply(all_rows, keys, dim, buffers.q, layout.row * 2, buffers.keys_t, layout.keys * 4, buffers.products,
                     layout.keys * 4);
  softmax_rows(p, layout, head, i0, rows, keys / kLanes, buffers.products, as_bfloat16(buffers.probabilities),
               buffers.factors, inverse_sum);
  Products::multiply(all_rows, dim, keys, buffers.probabilities, layout.keys * 2, buffers.value_pairs, layout.row * 4,
                     buffers.out, layout.row * 4);
  write_rows<bfloat16>(p, layout, head, i0, rows, buffers.out, inverse_sum);
}

template <class Products>
void forward_pairs(const PrefixAttentionParams& p, const Parallel& parallel) {
  using Buffers = PairBuffers<Products>;
  const Layout layout(p, 2 * kLanes);  // rows of pairs are whole vectors
  for_all_tiles<Buffers, Products>(
      p, layout, Products::kTileRows, parallel,
      [&](int64_t head, Buffers& buffers) { prepare_head_pairs(p, layout, head, buffers); },
      [&](int64_t head, int64_t i0, Buffers& buffers) { forward_tile_pairs(p, layout, head, i0, buffers); });
}
#endif

template <class T>
void forward(const PrefixAttentionParams& p, const Parallel& parallel) {
  const Layout layout(p);
  for_all_tiles<ForwardBuffers>(
      p, layout, kTile, parallel,
      [&](int64_t head, ForwardBuffers& buffers) { prepare_head<T>(p, layout, head, buffers); },
      [&](int64_t head, int64_t i0, ForwardBuffers& buffers) { forward_tile<T>(p, layout, head, i0, buffers); });
}

struct BackwardBuffers {
  FloatBuffer keys, keys_t, values, values_t, grad_keys, grad_values, q, grad_out, grad_q;
  FloatBuffer scores, grad_scores, factors, grad_weights;
  explicit BackwardBuffers(const Layout& layout)
      : keys(layout.per_key()),
        keys_t(layout.per_key()),
        values(layout.per_key()),
        values_t(layout.per_key()),
        grad_keys(layout.per_key()),
        grad_values(layout.per_key()),
        q(kTile * layout.row),
        grad_out(kTile * layout.row),
        grad_q(kTile * layout.row),
        scores(kTile * layout.keys),
        grad_scores(kTile * layout.keys),
        factors(layout.factors()),
        grad_weights(2 * layout.row) {}
  void zero() {
    for (FloatBuffer* buffer : {&keys, &keys_t, &values, &values_t, &grad_keys, &grad_values, &q, &grad_out, &grad_q,
                                &scores, &grad_scores, &factors, &grad_weights})
      buffer->zero();
  }
};

// Of the contiguous grad_qkv.
template <class T>
Rows<T> grad_rows(const PrefixAttentionBackwardParams& p, int64_t head, Part part) {
  const PrefixAttentionParams& f = p.forward;
  const int64_t b = head / f.heads, h = head % f.heads, stride = 3 * f.heads * f.head_dim;
  return {static_cast<T*>(p.grad_qkv) + b * f.length * stride + (part * f.heads + h) * f.head_dim, stride};
}

// All keys or values of a head: `grads` is (keys, row).
template <class T>
void backward_rows(const PrefixAttentionBackwardParams& p, const Layout& layout, int64_t head, Part part, float* grads,
                   float* grad_weight) {
  const Rows<const T> input = input_rows<T>(p.forward, head, part);
  const Rows<T> grad_input = grad_rows<T>(p, head, part);
  for (int64_t j = 0; j < p.forward.length; ++j)
    backward_row(p.forward, input[j], part, j, grads + j * layout.row, grad_weight, grad_input[j]);
}

// With P the probabilities, F the dropout factors, S the products Q K^T:
//   dV = (P F)^T dO,  dS = scale P (F (dO V^T) - rowsum(dO O)),  dQ = dS K,  dK = dS^T Q.
template <class T>
void backward_tile(const PrefixAttentionBackwardParams& params, const Layout& layout, int64_t head, int64_t i0,
                   BackwardBuffers& buffers) {
  const PrefixAttentionParams& p = params.forward;
  const int64_t n = p.head_dim, rows = std::min(kTile, p.length - i0), keys = visible_keys(p, i0 + rows - 1);
  const int64_t vectors = vectors_over(keys);
  float rowsum[kTile];
  prepare_rows<T>(p, layout, head, kQuery, i0, rows, +buffers.q);
  const Rows<const T> outs = output_rows<const T>(p, head, p.out);
  const Rows<const T> grad_outs = output_rows<const T>(p, head, params.grad_out);
  for (int64_t r = 0; r < rows; ++r) {
    const T* out = outs[i0 + r];
    const T* grad_out = grad_outs[i0 + r];
    Vec products;
    for (int64_t d = 0; d < n; d += kLanes) {
      const Vec grad = load_first(grad_out + d, n - d);
      grad.store(buffers.grad_out + r * layout.row + d);
      products = fma(grad, load_first(out + d, n - d), products);
    }
    rowsum[r] = sum(products);
  }
  multiply(rows, vectors, n, row_major(buffers.q, layout.row), buffers.keys_t, layout.keys, buffers.scores,
           layout.keys);
  multiply(rows, vectors, n, row_major(buffers.grad_out, layout.row), buffers.values_t, layout.keys,
           buffers.grad_scores, layout.keys);

  for (int64_t r = 0; r < rows; ++r) {
    float* row = buffers.scores + r * layout.keys;
    float* grad_row = buffers.grad_scores + r * layout.keys;
    const int64_t visible = visible_keys(p, i0 + r);
    if (p.dropout.threshold > 0) row_factors(p, head, i0 + r, keys, buffers.factors);
    const Vec lse = p.lse[head * p.length + i0 + r], mean = rowsum[r];
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t j = v * kLanes;
      const Vec probability = exp(visible_logits(row, p.scale, v, visible) - lse);
      const Vec factor = p.dropout.threshold > 0 ? Vec::load(buffers.factors + j) : Vec(1.0f);
      (probability * factor).store(row + j);
      (probability * (factor * Vec::load(grad_row + j) - mean) * Vec(p.scale)).store(grad_row + j);
    }
  }

  multiply<true>(keys, layout.row_vectors(), rows, transposed(buffers.scores, layout.keys), buffers.grad_out,
                 layout.row, buffers.grad_values, layout.row);
  multiply<true>(keys, layout.row_vectors(), rows, transposed(buffers.grad_scores, layout.keys), buffers.q, layout.row,
                 buffers.grad_keys, layout.row);
  multiply(rows, layout.row_vectors(), keys, row_major(buffers.grad_scores, layout.keys), buffers.keys, layout.row,
           buffers.grad_q, layout.row);
  const Rows<const T> queries = input_rows<T>(p, head, kQuery);
  const Rows<T> grad_queries = grad_rows<T>(params, head, kQuery);
  for (int64_t r = 0; r < rows; ++r) {
    float* grad_q = buffers.grad_q + r * layout.row;
    backward_row(p, queries[i0 + r], kQuery, i0 + r, grad_q, buffers.grad_weights, grad_queries[i0 + r]);
  }
}

template <class T>
void backward(const PrefixAttentionBackwardParams& params, const Parallel& parallel) {
  const PrefixAttentionParams& p = params.forward;
  const Layout layout(p);
  const int64_t heads = p.batch * p.heads, n = p.head_dim;
  float* partials = static_cast<float*>(p.workspace);  // (heads, 2, head_dim)
  Scratch<BackwardBuffers> scratch(parallel, heads, layout);
  parallel(0, heads, 1, [&](int64_t begin, int64_t end) {
    BackwardBuffers& buffers = scratch.take();
    buffers.zero();
    for (int64_t head = begin; head < end; ++head) {
      buffers.grad_weights.zero();
      prepare_rows<T>(p, layout, head, kKey, 0, p.length, +buffers.keys);
      prepare_rows<T>(p, layout, head, kValue, 0, p.length, +buffers.values);
      transpose(layout, layout.row, buffers.keys, buffers.keys_t);
      transpose(layout, layout.row, buffers.values, buffers.values_t);
      buffers.grad_keys.zero();
      buffers.grad_values.zero();
      for (int64_t i0 = 0; i0 < p.length; i0 += kTile) backward_tile<T>(params, layout, head, i0, buffers);
      backward_rows<T>(params, layout, head, kKey, buffers.grad_keys, buffers.grad_weights + layout.row);
      backward_rows<T>(params, layout, head, kValue, buffers.grad_values, nullptr);
      if (partials != nullptr) {
        std::memcpy(partials + head * 2 * n, buffers.grad_weights, n * sizeof(float));
        std::memcpy(partials + head * 2 * n + n, buffers.grad_weights + layout.row, n * sizeof(float));
      }
    }
  });
  if (partials == nullptr) return;
  for (int64_t d = 0; d < n; ++d) {
    double q_sum = 0, k_sum = 0;
    for (int64_t head = 0; head < heads; ++head) {
      q_sum += partials[head * 2 * n + d];
      k_sum += partials[head * 2 * n + n + d];
    }
    params.grad_q_norm_weight[d] = static_cast<float>(q_sum);
    params.grad_k_norm_weight[d] = static_cast<float>(k_sum);
  }
}

}  // namespace

void prefix_attention_cpu(const PrefixAttentionParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case AttentionDtype::float32: return forward<float>(p, parallel);
    case AttentionDtype::bfloat16:
#if defined(__AVX512BF16__)
      return cpu_has_amx() ? forward_pairs<AmxProducts>(p, parallel) : forward_pairs<DotProducts>(p, parallel);
#else
      return forward<bfloat16>(p, parallel);
#endif
    case AttentionDtype::float16: return forward<float16>(p, parallel);
  }
}

void prefix_attention_backward_cpu(const PrefixAttentionBackwardParams& p, const Parallel& parallel) {
  switch (p.forward.dtype) {
    case AttentionDtype::float32: return backward<float>(p, parallel);
    case AttentionDtype::bfloat16: return backward<bfloat16>(p, parallel);
    case AttentionDtype::float16: return backward<float16>(p, parallel);
  }
}

}  // namespace alitok::ALITOK_ISA
