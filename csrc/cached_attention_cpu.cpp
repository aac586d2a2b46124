// A task for each row and head, in float32. The loops are short and plain: the compiler vectorises them, and on the CPU
// the time of a step goes into the weights; the generator's CPU sampler (decode) fuses the whole step.
#include "cached_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "e4m3.h"

namespace alitok {
namespace ALITOK_ISA {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(e4m3 x) { return from_e4m3(x); }
inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float to_float(float16 x) {
  const uint32_t exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                          : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                           : std::ldexp(static_cast<float>(mantissa + 1024), static_cast<int>(exponent) - 25);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

template <class T>
T from_float(float x);
template <>
inline float from_float(float x) {
  return x;
}
template <>
inline e4m3 from_float(float x) {
  return to_e4m3(x);
}
template <>
inline bfloat16 from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 from_float(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7e00};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // nearbyint rounds ties to even; the unit is 2^-24 for denormals and 2^(exponent - 10) above.
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (units + (static_cast<uint32_t>(exponent + 14) << 10)))};
}

template <class T>
float rounded(float x) {
  return to_float(from_float<T>(x));
}

// RMSNorm, weight and rotation of one head, rounded to T where the reference rounds.
template <class T>
void normalise_and_rotate(const T* x, float* y, const float* weight, float eps, const float* rope, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) y[d] = to_float(x[d]);
  if (weight != nullptr) {
    float squares = 0;
    for (int64_t d = 0; d < dim; ++d) squares += y[d] * y[d];
    const float inverse = 1 / std::sqrt(squares / static_cast<float>(dim) + eps);
    for (int64_t d = 0; d < dim; ++d) y[d] = rounded<T>(rounded<T>(y[d] * inverse) * rounded<T>(weight[d]));
  }
  if (rope == nullptr) return;
  for (int64_t d = 0; d < dim; d += 2) {
    const float even = y[d], odd = y[d + 1];
    y[d] = rounded<T>(even * rope[d] - odd * rope[d + 1]);
    y[d + 1] = rounded<T>(even * rope[d + 1] + odd * rope[d]);
  }
}

// `scratch`: query (dim), sum (dim), scores (capacity).
template <class T, class Cache>
void attend(const CachedAttentionParams& p, int64_t row, int64_t head, float* scratch) {
  const int64_t dim = p.head_dim, position = *p.position;
  float *query = scratch, *sum = query + dim, *scores = sum + dim;
  T* out = static_cast<T*>(p.out) + (row * p.heads + head) * dim;
  if (position < 0 || position >= p.capacity) {
    std::fill(out, out + dim, from_float<T>(std::numeric_limits<float>::quiet_NaN()));
    return;
  }
  const T* qkv = static_cast<const T*>(p.qkv) + (row * 3 * p.heads + head) * dim;
  Cache* keys = static_cast<Cache*>(p.keys) + row * p.row_stride + head * p.head_stride;
  Cache* values = static_cast<Cache*>(p.values) + row * p.row_stride + head * p.head_stride;
  const float* rope = p.rope == nullptr ? nullptr : p.rope + position * dim;
  normalise_and_rotate(qkv + p.heads * dim, sum, p.k_norm_weight, p.norm_eps, rope, dim);
  const T* value = qkv + 2 * p.heads * dim;
  for (int64_t d = 0; d < dim; ++d) {
    keys[position * dim + d] = from_float<Cache>(sum[d]);
    values[position * dim + d] = from_float<Cache>(to_float(value[d]));
  }
  normalise_and_rotate(qkv, query, p.q_norm_weight, p.norm_eps, rope, dim);

  float largest = -INFINITY;
  for (int64_t j = 0; j <= position; ++j) {
    float dot = 0;
    for (int64_t d = 0; d < dim; ++d) dot += query[d] * to_float(keys[j * dim + d]);
    scores[j] = dot * p.scale;
    largest = std::max(largest, scores[j]);
  }
  float total = 0;
  std::fill(sum, sum + dim, 0.0f);
  for (int64_t j = 0; j <= position; ++j) {
    const float weight = std::exp(scores[j] - largest);
    total += weight;
    for (int64_t d = 0; d < dim; ++d) sum[d] += weight * to_float(values[j * dim + d]);
  }
  for (int64_t d = 0; d < dim; ++d) out[d] = from_float<T>(sum[d] / total);
}

template <class T, class Cache>
void run(const CachedAttentionParams& p, const Parallel& parallel) {
  parallel(0, p.rows * p.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(2 * p.head_dim + p.capacity));
    for (int64_t task = begin; task < end; ++task) attend<T, Cache>(p, task / p.heads, task % p.heads, scratch.data());
  });
}

template <class T>
void run_for_cache(const CachedAttentionParams& p, const Parallel& parallel) {
  if (p.cache_dtype == CachedAttentionDtype::e4m3) return run<T, e4m3>(p, parallel);
  run<T, T>(p, parallel);
}

}  // namespace

void cached_attention_cpu(const CachedAttentionParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case CachedAttentionDtype::float32: return run_for_cache<float>(p, parallel);
    case CachedAttentionDtype::bfloat16: return run_for_cache<bfloat16>(p, parallel);
    default: return run_for_cache<float16>(p, parallel);
  }
}

}  // namespace ALITOK_ISA
}  // namespace alitok
