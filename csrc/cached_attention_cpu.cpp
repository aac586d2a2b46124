// A task for each row and head, in float32. On the CPU the time of a step goes into the weights, and the generator's
// CPU sampler fuses the whole step (decode); this is the same operator on its own.
#include "cached_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "element.h"
#include "scratch.h"

namespace alitok {
namespace ALITOK_ISA {
namespace {

// RMSNorm, weight and rotation of one head, rounded to the type where the reference rounds.
template <class Type>
void normalise_and_rotate(const typename Type::Storage* x, float* y, const float* weight, float eps, const float* rope,
                          int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) y[d] = Type::get(x + d);
  if (weight != nullptr) {
    Vec squares;
    for_vectors(dim, [&](int64_t d, int count) {
      const Vec v = Vec::load(y + d, count);
      squares = fma(v, v, squares);
    });
    const float inverse = 1 / std::sqrt(sum(squares) / static_cast<float>(dim) + eps);
    for (int64_t d = 0; d < dim; ++d) y[d] = rounded<Type>(rounded<Type>(y[d] * inverse) * rounded<Type>(weight[d]));
  }
  if (rope == nullptr) return;
  for (int64_t d = 0; d < dim; d += 2) {
    const float even = y[d], odd = y[d + 1];
    y[d] = rounded<Type>(even * rope[d] - odd * rope[d + 1]);
    y[d + 1] = rounded<Type>(even * rope[d + 1] + odd * rope[d]);
  }
}

// `scratch`: query (dim), total (dim), scores (capacity).
template <class Type, class Cache>
void attend(const CachedAttentionParams& p, int64_t row, int64_t column, int64_t head, float* scratch) {
  using T = typename Type::Storage;
  using C = typename Cache::Storage;
  const int64_t dim = p.head_dim, first = p.positions[row], slot = p.slot_of == nullptr ? row : p.slot_of[row];
  float *query = scratch, *total = query + dim, *scores = total + dim;
  const int64_t index = row * p.columns + column;
  T* out = static_cast<T*>(p.out) + (index * p.heads + head) * dim;
  if (first < 0 || first >= p.capacity - column || slot < 0 || slot >= p.slots) {
    for (int64_t d = 0; d < dim; ++d) Type::set(out + d, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const int64_t position = first + column;
  const T* qkv = static_cast<const T*>(p.qkv) + (index * 3 * p.heads + head) * dim;
  C* keys = static_cast<C*>(p.keys) + slot * p.slot_stride + head * p.head_stride;
  C* values = static_cast<C*>(p.values) + slot * p.slot_stride + head * p.head_stride;
  const float* rope = p.rope == nullptr ? nullptr : p.rope + position * dim;
  normalise_and_rotate<Type>(qkv + p.heads * dim, total, p.k_norm_weight, p.norm_eps, rope, dim);
  const T* value = qkv + 2 * p.heads * dim;
  for (int64_t d = 0; d < dim; ++d) {
    Cache::set(keys + position * dim + d, total[d]);
    Cache::set(values + position * dim + d, Type::get(value + d));
  }
  normalise_and_rotate<Type>(qkv, query, p.q_norm_weight, p.norm_eps, rope, dim);

  float largest = -INFINITY;
  for (int64_t j = 0; j <= position; ++j) {
    Vec dot;
    for_vectors(dim, [&](int64_t d, int count) {
      dot = fma(Vec::load(query + d, count), Cache::load(keys + j * dim + d, count), dot);
    });
    scores[j] = sum(dot) * p.scale;
    largest = std::max(largest, scores[j]);
  }
  float mass = 0;
  std::fill(total, total + dim, 0.0f);
  for (int64_t j = 0; j <= position; ++j) {
    const float weight = std::exp(scores[j] - largest);
    mass += weight;
    for_vectors(dim, [&](int64_t d, int count) {
      fma(Vec(weight), Cache::load(values + j * dim + d, count), Vec::load(total + d, count)).store(total + d, count);
    });
  }
  for_vectors(dim, [&](int64_t d, int count) { Type::store(out + d, Vec::load(total + d, count) / Vec(mass), count); });
}

template <class Type, class Cache>
void run(const CachedAttentionParams& p, const Parallel& parallel) {
  Scratch<FloatBuffer> scratch(parallel, p.rows * p.heads, 2 * p.head_dim + p.capacity);
  parallel(0, p.rows * p.heads, 1, [&](int64_t begin, int64_t end) {
    float* mine = scratch.take();
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t column = 0; column < p.columns; ++column)
        attend<Type, Cache>(p, task / p.heads, column, task % p.heads, mine);
    }
  });
}

template <class Type>
void run_for_cache(const CachedAttentionParams& p, const Parallel& parallel) {
  if (p.cache_dtype == CachedAttentionDtype::e4m3) return run<Type, E4m3>(p, parallel);
  run<Type, Type>(p, parallel);
}

}  // namespace

void cached_attention_cpu(const CachedAttentionParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case CachedAttentionDtype::float32: return run_for_cache<Float32>(p, parallel);
    case CachedAttentionDtype::bfloat16: return run_for_cache<BFloat16>(p, parallel);
    default: return run_for_cache<Float16>(p, parallel);
  }
}

}  // namespace ALITOK_ISA
}  // namespace alitok
