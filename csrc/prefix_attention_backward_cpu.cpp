// The gradients of prefix_attention on the CPU. With P the probabilities, F the dropout factors, S the products Q K^T:
//   dV = (P F)^T dO,  dS = scale P (F (dO V^T) - rowsum(dO O)),  dQ = dS K,  dK = dS^T Q.
#include "prefix_attention_cpu.h"

namespace alitok::ALITOK_ISA {
namespace {

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
  for (int64_t j = 0; j < p.forward.length; ++j) {
    const int64_t ahead = std::min(j + kAhead, p.forward.length - 1);
    input.fetch(ahead, p.forward.head_dim);
    grad_input.fetch(ahead, p.forward.head_dim);
    backward_row(p.forward, input[j], part, j, grads + j * layout.row, grad_weight, grad_input[j]);
  }
}

// Rows of grad_out, and what each row's probabilities lose in common: rowsum(dO O).
template <class T, class Out>
void take_grad_out(const PrefixAttentionBackwardParams& params, const Layout& layout, int64_t head, int64_t i0,
                   int64_t rows, Out* to, float* rowsum) {
  const PrefixAttentionParams& p = params.forward;
  const Rows<const T> outs = output_rows<const T>(p, head, p.out);
  const Rows<const T> grad_outs = output_rows<const T>(p, head, params.grad_out);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t ahead = std::min(i0 + r + kAhead, p.length - 1);
    outs.fetch(ahead, p.head_dim);
    grad_outs.fetch(ahead, p.head_dim);
    const T* out = outs[i0 + r];
    const T* grad_out = grad_outs[i0 + r];
    Vec products;
    for (int64_t d = 0; d < p.head_dim; d += kLanes) {
      const Vec grad = load_first(grad_out + d, p.head_dim - d);
      store_first(grad, to + r * layout.row + d, kLanes);
      products = fma(grad, load_first(out + d, p.head_dim - d), products);
    }
    rowsum[r] = sum(products);
  }
}

// With P the probabilities, F the dropout factors, S the products Q K^T of row i: P F and dS.
class RowGradients {
 public:
  RowGradients(const PrefixAttentionParams& p, int64_t head, int64_t i, float rowsum, float* factors)
      : unit_(p.scale * kLog2E),
        lse_(p.lse[head * p.length + i] * kLog2E),
        mean_(rowsum),
        scale_(p.scale),
        factors_(p.dropout.threshold > 0 ? factors : nullptr) {
    if (factors_ != nullptr) row_factors(p, head, i, visible_keys(p, i), factors);
  }

  struct Pair {
    Vec probability, grad;
  };
  // Of `count` keys in vector v, from the rows of S and of dO V^T.
  template <class Count>
  Pair of(int64_t v, const float* products, const float* grads, Count count) const {
    const int64_t j = v * kLanes;
    const Vec probability = first_lanes(exp2_of_negative(Vec::load(products + j) * unit_ - lse_), Vec(), count);
    const Vec factor = factors_ == nullptr ? Vec(1.0f) : Vec::load(factors_ + j);
    return {probability * factor, probability * (factor * Vec::load(grads + j) - mean_) * scale_};
  }

 private:
  Vec unit_, lse_, mean_, scale_;
  const float* factors_;
};

template <class T>
void backward_tile(const PrefixAttentionBackwardParams& params, const Layout& layout, int64_t head, int64_t i0,
                   BackwardBuffers& buffers) {
  const PrefixAttentionParams& p = params.forward;
  const int64_t n = p.head_dim, rows = std::min(kTile, p.length - i0), keys = visible_keys(p, i0 + rows - 1);
  const int64_t vectors = vectors_over(keys);
  float rowsum[kTile];
  prepare_rows<T>(p, layout, head, kQuery, i0, rows, +buffers.q);
  take_grad_out<T>(params, layout, head, i0, rows, +buffers.grad_out, rowsum);
  multiply(rows, vectors, n, row_major(buffers.q, layout.row), buffers.keys_t, layout.keys, buffers.scores,
           layout.keys);
  multiply(rows, vectors, n, row_major(buffers.grad_out, layout.row), buffers.values_t, layout.keys,
           buffers.grad_scores, layout.keys);

  for (int64_t r = 0; r < rows; ++r) {
    float* row = buffers.scores + r * layout.keys;
    float* grad_row = buffers.grad_scores + r * layout.keys;
    const RowGradients gradients(p, head, i0 + r, rowsum[r], buffers.factors);
    over_keys(
        visible_keys(p, i0 + r), vectors,
        [&](int64_t v, auto count) {
          const auto [probability, grad] = gradients.of(v, row, grad_row, count);
          probability.store(row + v * kLanes);
          grad.store(grad_row + v * kLanes);
        },
        [&](int64_t v) {
          Vec().store(row + v * kLanes);
          Vec().store(grad_row + v * kLanes);
        });
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

// Calls `head(index, buffers)` for all heads on all threads, which leaves its share of the gradients of the norm weights in
// buffers.grad_weights; these are summed in the heads' order.
template <class Buffers, class ThreadSetup = NoSetup, class Head>
void for_all_heads(const PrefixAttentionBackwardParams& params, const Layout& layout, const Parallel& parallel,
                   const Head& of_head) {
  const PrefixAttentionParams& p = params.forward;
  const int64_t heads = p.batch * p.heads, n = p.head_dim;
  float* partials = static_cast<float*>(p.workspace);  // (heads, 2, head_dim)
  Scratch<Buffers> scratch(parallel, heads, layout);
  parallel(0, heads, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] ThreadSetup setup{};
    Buffers& buffers = scratch.take();
    buffers.zero();
    for (int64_t head = begin; head < end; ++head) {
      buffers.grad_weights.zero();
      of_head(head, buffers);
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

template <class T>
void backward(const PrefixAttentionBackwardParams& params, const Parallel& parallel) {
  const PrefixAttentionParams& p = params.forward;
  const Layout layout(p);
  for_all_heads<BackwardBuffers>(params, layout, parallel, [&](int64_t head, BackwardBuffers& buffers) {
    prepare_rows<T>(p, layout, head, kKey, 0, p.length, +buffers.keys);
    prepare_rows<T>(p, layout, head, kValue, 0, p.length, +buffers.values);
    transpose(layout.keys, layout.row, buffers.keys, layout.row, buffers.keys_t, layout.keys);
    transpose(layout.keys, layout.row, buffers.values, layout.row, buffers.values_t, layout.keys);
    buffers.grad_keys.zero();
    buffers.grad_values.zero();
    for (int64_t i0 = 0; i0 < p.length; i0 += kTile) backward_tile<T>(params, layout, head, i0, buffers);
    backward_rows<T>(params, layout, head, kKey, buffers.grad_keys, buffers.grad_weights + layout.row);
    backward_rows<T>(params, layout, head, kValue, buffers.grad_values, nullptr);
  });
}

#if defined(__AVX512BF16__)
// The same for bfloat16: all five products are of bfloat16, and so are what they read: P F, dS and grad_out.
// Keys and values lie as for the forward pass; gradients of keys and values add up transposed, (row, keys), so that P F and
// dS are right matrices, whose rows lie in pairs as they come.
constexpr int64_t kPairTile = 96;  // rows whose P F and dS are added to the gradients of keys and values together
constexpr int64_t kPairPart = 32;  // rows that meet the keys together

struct PairBackwardBuffers {
  FloatBuffer rows, keys_t, key_pairs, values_t, grad_keys_t, grad_values_t, grads;
  FloatBuffer q, grad_out, pairs, q_t, grad_out_t, grad_q;
  FloatBuffer scores, grad_scores, probability_pairs, grad_score_pairs, grad_score_rows, factors, grad_weights;
  explicit PairBackwardBuffers(const Layout& layout)
      : rows(layout.per_key() / 2),
        keys_t(layout.per_key() / 2),
        key_pairs(layout.per_key() / 2),
        values_t(layout.per_key() / 2),
        grad_keys_t(layout.per_key()),
        grad_values_t(layout.per_key()),
        grads(layout.per_key()),
        q(kPairTile * layout.row / 2),
        grad_out(kPairTile * layout.row / 2),
        pairs(kPairTile * layout.row / 2),
        q_t(kPairTile * layout.row / 2),
        grad_out_t(kPairTile * layout.row / 2),
        grad_q(kPairPart * layout.row),
        scores(kPairPart * layout.keys),
        grad_scores(kPairPart * layout.keys),
        probability_pairs(kPairTile / 2 * layout.keys),
        grad_score_pairs(kPairTile / 2 * layout.keys),
        grad_score_rows(kPairPart * layout.keys / 2),
        factors(2 * layout.factors()),
        grad_weights(2 * layout.row) {}
  void zero() {
    for (FloatBuffer* buffer : {&rows,
                                &keys_t,
                                &key_pairs,
                                &values_t,
                                &grad_keys_t,
                                &grad_values_t,
                                &grads,
                                &q,
                                &grad_out,
                                &pairs,
                                &q_t,
                                &grad_out_t,
                                &grad_q,
                                &scores,
                                &grad_scores,
                                &probability_pairs,
                                &grad_score_pairs,
                                &grad_score_rows,
                                &factors,
                                &grad_weights})
      buffer->zero();
  }
};

// Rounded to bfloat16: 16 words of which `low` has the low halves.
__m512i pair_up(__m512i halves) {
  const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(in_turn, halves);
}
__m512i narrow(Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v); }

// (kPairTile, row) bfloat16 -> (row, kPairTile).
void transpose_tile(const Layout& layout, float* rows, float* pairs, float* columns) {
  pair_rows(kPairTile / 2, layout.row, as_bfloat16(rows), pairs);
  transpose(kPairTile / 2, layout.row, pairs, layout.row, columns, kPairTile / 2);
}

// P F and dS of rows i and i + 1, of which the second may be missing, over `keys` keys: to pairs, and dS to rows too.
void pair_gradients(const PrefixAttentionParams& p, const Layout& layout, int64_t head, int64_t i, int64_t keys,
                    const float* scores, const float* grad_scores, const float* rowsum, PairBackwardBuffers& buffers,
                    float* probability_pairs, float* grad_pairs, bfloat16* grad_rows) {
  const bool both = i + 1 < p.length;
  const int64_t first = visible_keys(p, i), second = both ? visible_keys(p, i + 1) : 0;
  const RowGradients upper(p, head, i, rowsum[0], buffers.factors);
  const RowGradients lower(p, head, both ? i + 1 : i, rowsum[both], buffers.factors + layout.factors());
  const auto write = [&](int64_t v, const RowGradients::Pair& a, const RowGradients::Pair& b) {
    const int64_t j = v * kLanes;
    const __m512i grads = narrow(a.grad, b.grad);
    _mm512_store_si512(probability_pairs + j, pair_up(narrow(a.probability, b.probability)));
    _mm512_store_si512(grad_pairs + j, pair_up(grads));
    _mm256_store_si256(reinterpret_cast<__m256i*>(grad_rows + j), _mm512_castsi512_si256(grads));
    _mm256_store_si256(reinterpret_cast<__m256i*>(grad_rows + layout.keys + j), _mm512_extracti64x4_epi64(grads, 1));
  };
  const auto of_both = [&](int64_t v, auto a, auto b) {
    write(v, upper.of(v, scores, grad_scores, a), lower.of(v, scores + layout.keys, grad_scores + layout.keys, b));
  };
  const auto within = [](int64_t visible, int64_t v) {
    return static_cast<int>(std::clamp<int64_t>(visible - v * kLanes, 0, kLanes));
  };
  over_keys(
      std::min(first, second) / kLanes * kLanes, keys / kLanes, [&](int64_t v, auto all) { of_both(v, all, all); },
      [&](int64_t v) {
        const int a = within(first, v), b = within(second, v);
        if (a + b > 0) {
          of_both(v, a, b);
        } else {
          write(v, {}, {});
        }
      });
}

template <class Products>
void backward_tile_pairs(const PrefixAttentionBackwardParams& params, const Layout& layout, int64_t head, int64_t i0,
                         PairBackwardBuffers& buffers) {
  const PrefixAttentionParams& p = params.forward;
  const int64_t rows = std::min(kPairTile, p.length - i0), used = round_up(rows, kPairPart);
  const int64_t dim = round_up(p.head_dim, kPairPart), all_keys = round_up(visible_keys(p, i0 + rows - 1), kPairPart);
  const int64_t row_bytes = layout.row * 2, keys_bytes = layout.keys * 4, tile_bytes = kPairTile * 2;
  float rowsum[kPairTile];
  if (rows < kPairTile) buffers.q.zero(), buffers.grad_out.zero();
  prepare_rows<bfloat16>(p, layout, head, kQuery, i0, rows, as_bfloat16(buffers.q));
  take_grad_out<bfloat16>(params, layout, head, i0, rows, as_bfloat16(buffers.grad_out), rowsum);
  const Rows<const bfloat16> queries = input_rows<bfloat16>(p, head, kQuery);
  const Rows<bfloat16> grad_queries = grad_rows<bfloat16>(params, head, kQuery);
  for (int64_t part = 0; part < used; part += kPairPart) {
    const int64_t count = std::min(kPairPart, rows - part);
    const int64_t keys = round_up(visible_keys(p, i0 + part + count - 1), kPairPart);
    const float *q = buffers.q + part * layout.row / 2, *grad_out = buffers.grad_out + part * layout.row / 2;
    Products::multiply(kPairPart, keys, dim, q, row_bytes, +buffers.keys_t, keys_bytes, +buffers.scores, keys_bytes);
    Products::multiply(kPairPart, keys, dim, grad_out, row_bytes, +buffers.values_t, keys_bytes, +buffers.grad_scores,
                       keys_bytes);
    for (int64_t r = 0; r < kPairPart; r += 2) {
      float* probability_pairs = buffers.probability_pairs + (part + r) / 2 * layout.keys;
      float* grad_pairs = buffers.grad_score_pairs + (part + r) / 2 * layout.keys;
      bfloat16* grad_rows = as_bfloat16(buffers.grad_score_rows) + r * layout.keys;
      int64_t written = 0;
      if (r < count) {
        pair_gradients(p, layout, head, i0 + part + r, keys, buffers.scores + r * layout.keys,
                       buffers.grad_scores + r * layout.keys, rowsum + part + r, buffers, probability_pairs, grad_pairs,
                       grad_rows);
        written = keys;
      }
      std::fill(probability_pairs + written, probability_pairs + all_keys, 0.0f);
      std::fill(grad_pairs + written, grad_pairs + all_keys, 0.0f);
    }
    Products::multiply(kPairPart, dim, keys, +buffers.grad_score_rows, layout.keys * 2, +buffers.key_pairs,
                       layout.row * 4, +buffers.grad_q, layout.row * 4);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = i0 + part + r;
      backward_row(p, queries[i], kQuery, i, buffers.grad_q + r * layout.row, buffers.grad_weights, grad_queries[i]);
    }
  }
  transpose_tile(layout, buffers.q, buffers.pairs, buffers.q_t);
  transpose_tile(layout, buffers.grad_out, buffers.pairs, buffers.grad_out_t);
  Products::template multiply<true>(dim, all_keys, used, +buffers.grad_out_t, tile_bytes, +buffers.probability_pairs,
                                    keys_bytes, +buffers.grad_values_t, keys_bytes);
  Products::template multiply<true>(dim, all_keys, used, +buffers.q_t, tile_bytes, +buffers.grad_score_pairs,
                                    keys_bytes, +buffers.grad_keys_t, keys_bytes);
}

template <class Products>
void backward_pairs(const PrefixAttentionBackwardParams& params, const Parallel& parallel) {
  using Buffers = PairBackwardBuffers;
  const PrefixAttentionParams& p = params.forward;
  const Layout layout(p, 2 * kLanes);  // rows of pairs are whole vectors
  for_all_heads<Buffers, Products>(params, layout, parallel, [&](int64_t head, Buffers& buffers) {
    const auto prepare = [&](Part part, float* columns) {
      prepare_rows<bfloat16>(p, layout, head, part, 0, p.length, as_bfloat16(buffers.rows));
      transpose(layout.keys, layout.row / 2, buffers.rows, layout.row / 2, columns, layout.keys);
    };
    prepare(kValue, buffers.values_t);
    prepare(kKey, buffers.keys_t);
    pair_rows(layout.keys / 2, layout.row, as_bfloat16(buffers.rows), buffers.key_pairs);
    buffers.grad_keys_t.zero();
    buffers.grad_values_t.zero();
    for (int64_t i0 = 0; i0 < p.length; i0 += kPairTile)
      backward_tile_pairs<Products>(params, layout, head, i0, buffers);
    const auto finish = [&](Part part, const float* columns, float* grad_weight) {
      transpose(layout.row, layout.keys, columns, layout.keys, buffers.grads, layout.row);
      backward_rows<bfloat16>(params, layout, head, part, buffers.grads, grad_weight);
    };
    finish(kKey, buffers.grad_keys_t, buffers.grad_weights + layout.row);
    finish(kValue, buffers.grad_values_t, nullptr);
  });
}
#endif

}  // namespace

void prefix_attention_backward_cpu(const PrefixAttentionBackwardParams& p, const Parallel& parallel) {
  switch (p.forward.dtype) {
    case AttentionDtype::float32: return backward<float>(p, parallel);
    case AttentionDtype::bfloat16:
#if defined(__AVX512BF16__)
      return cpu_has_amx() ? backward_pairs<AmxProducts>(p, parallel) : backward_pairs<DotProducts>(p, parallel);
#else
      return backward<bfloat16>(p, parallel);
#endif
    case AttentionDtype::float16: return backward<float16>(p, parallel);
  }
}

}  // namespace alitok::ALITOK_ISA
