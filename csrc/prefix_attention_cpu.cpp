#include "prefix_attention_cpu.h"

namespace alitok::ALITOK_ISA {
namespace {

// Rows of products become probabilities times row sum, after dropout, over whole `vectors`; writes the log-sum-exp.
// `probabilities` may be the products themselves; rows of both are layout.keys elements apart.
template <class Out>
void softmax_rows(const PrefixAttentionParams& p, const Layout& layout, int64_t head, int64_t i0, int64_t rows,
                  int64_t vectors, const float* products, Out* probabilities, float* factors, float* inverse_sum) {
  const bool dropout = p.dropout.threshold > 0;
  const Vec unit = p.scale * kLog2E;  // logits count in powers of two
  for (int64_t r = 0; r < rows; ++r) {
    const float* in = products + r * layout.keys;
    Out* out = probabilities + r * layout.keys;
    const int64_t i = i0 + r, visible = visible_keys(p, i);
    if (dropout) row_factors(p, head, i, visible, factors);
    Vec top = -INFINITY, total;
    over_keys(
        visible, 0,
        [&](int64_t v, auto count) { top = max(top, first_lanes(Vec::load(in + v * kLanes) * unit, top, count)); },
        [](int64_t) {});
    const float row_max = max(top);
    over_keys(
        visible, vectors,
        [&](int64_t v, auto count) {
          const Vec e = first_lanes(exp2_of_negative(Vec::load(in + v * kLanes) * unit - Vec(row_max)), Vec(), count);
          total += e;
          store_first(dropout ? e * Vec::load(factors + v * kLanes) : e, out + v * kLanes, kLanes);
        },
        [&](int64_t v) { store_first(Vec(), out + v * kLanes, kLanes); });
    const float row_sum = sum(total);
    inverse_sum[r] = 1.0f / row_sum;
    p.lse[head * p.length + i] = row_max * kLn2 + std::log(row_sum);
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
  transpose(layout.keys, layout.row, buffers.keys, layout.row, buffers.keys_t, layout.keys);
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
// The same for bfloat16; probabilities are rounded to bfloat16.
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

template <class Products>
void prepare_head_pairs(const PrefixAttentionParams& p, const Layout& layout, int64_t head,
                        PairBuffers<Products>& buffers) {
  prepare_rows<bfloat16>(p, layout, head, kKey, 0, p.length, as_bfloat16(buffers.keys));
  transpose(layout.keys, layout.row / 2, buffers.keys, layout.row / 2, buffers.keys_t, layout.keys);  // pairs along d
  prepare_rows<bfloat16>(p, layout, head, kValue, 0, p.length, as_bfloat16(buffers.values));
  pair_rows((p.length + 1) / 2, layout.row, as_bfloat16(buffers.values), buffers.value_pairs);
}

template <class Products>
void forward_tile_pairs(const PrefixAttentionParams& p, const Layout& layout, int64_t head, int64_t i0,
                        PairBuffers<Products>& buffers) {
  const int64_t rows = std::min(Products::kTileRows, p.length - i0), all_rows = round_up(rows, Products::kRowBlock);
  const int64_t keys = round_up(visible_keys(p, i0 + rows - 1), Products::kBlock);
  const int64_t dim = round_up(p.head_dim, Products::kBlock);
  float inverse_sum[Products::kTileRows];
  prepare_rows<bfloat16>(p, layout, head, kQuery, i0, rows, as_bfloat16(buffers.q));
  Products::multiply(all_rows, keys, dim, +buffers.q, layout.row * 2, +buffers.keys_t, layout.keys * 4,
                     +buffers.products, layout.keys * 4);
  softmax_rows(p, layout, head, i0, rows, keys / kLanes, buffers.products, as_bfloat16(buffers.probabilities),
               buffers.factors, inverse_sum);
  Products::multiply(all_rows, dim, keys, +buffers.probabilities, layout.keys * 2, +buffers.value_pairs, layout.row * 4,
                     +buffers.out, layout.row * 4);
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

}  // namespace alitok::ALITOK_ISA
