// The arithmetic of sample_tokens, the same to the last bit on every device: each operation is correctly rounded by
// IEEE 754, every product that meets a sum is an explicit fma, which leaves compilers nothing to contract, and
// probabilities are summed as integers, in any order. The CPU's kernels and the GPU's so draw the same token from the
// same logits.
#pragma once

#include <cmath>
#include <cstring>

#include "philox.h"

namespace alitok {

constexpr float kInfinity = INFINITY;

ALITOK_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

ALITOK_HOST_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// u + (c - u) * scale; -inf where either is, in which that would be NaN. The sum c + u finds such a code, and is NaN
// when the other is NaN or +inf: that must not be hidden.
ALITOK_HOST_DEVICE float guided(float c, float u, float scale) {
  const float product = fmaf(c - u, scale, 0.0f);  // rounded on its own, as in PyTorch
  return c + u == -kInfinity ? -kInfinity : u + product;
}

// Neither NaN nor +inf.
ALITOK_HOST_DEVICE bool is_logit(float x) { return x < kInfinity; }

// 1 - u for a random word: (word + 1/2) / 2^32 rounded to float, in [2^-33, 1 - 2^-24]. Fine-grained where the noise
// is large: u itself, a float near 1, would leave it only 2^24 values, and the winners of long rows would often tie.
ALITOK_HOST_DEVICE float uniform_complement(uint32_t word) {
  const float v = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  return v < 1.0f ? v : 0x1.fffffep-1f;
}

// Natural logarithm of a normal, positive x with |exponent| < 64, within one unit in the last place.
ALITOK_HOST_DEVICE float log_reproducible(float x) {
  // x = 2^exponent * (1 + f), 1 + f in [sqrt(1/2), sqrt(2))
  constexpr uint32_t kSqrtHalf = 0x3F3504F3u;
  const uint32_t bits = float_bits(x) - kSqrtHalf;
  const float exponent = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float f = bits_float((bits & 0x7FFFFFu) + kSqrtHalf) - 1.0f;  // exact
  // log(1 + f) = 2 atanh(s) = 2s + s z (2/3 + 2/5 z + ...), s = f / (2 + f), z = s^2 < 0.03, and 2s = f - s f
  const float s = f / (2.0f + f), z = s * s;
  const float series = fmaf(z, fmaf(z, fmaf(z, 2.0f / 9, 2.0f / 7), 2.0f / 5), 2.0f / 3);
  // ln 2 in two parts, the first of 17 bits: its product with the exponent is exact.
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  const float low = fmaf(-s, fmaf(-z, series, f), exponent * kLn2Low);
  return fmaf(exponent, kLn2High, f + low);
}

// Standard Gumbel noise -log(-log(u)) of a random word, between -2.9 and 22.9.
ALITOK_HOST_DEVICE float gumbel(uint32_t word) {
  const float v = uniform_complement(word), u = 1.0f - v, lost = (1.0f - u) - v;  // 1 - v = u + lost exactly
  const float exponential = -(log_reproducible(u) + lost / u);
  return -log_reproducible(exponential);
}

// No noise is larger, and none of a given word is larger than gumbel_bound(word) * kGumbelBoundUnit: -log(u) > v, and
// the bits of a float, read as a number, are a chord of its logarithm. (Checked for all 2^32 words: at least 5e-5 lie
// between, far more than the rounding of what the bound is used for.)
constexpr float kGumbelLargest = 22.9f;
constexpr float kGumbelBoundUnit = 0x1.62e43p-24f * (1 + 0x1p-18f);  // ln 2 / 2^23, and a little
ALITOK_HOST_DEVICE float gumbel_bound(uint32_t word) {
  constexpr uint32_t kTwoTo32 = 0x4F800000u;
  return static_cast<float>(static_cast<int32_t>(kTwoTo32 - float_bits(static_cast<float>(word))));
}

// The weight of a code in a softmax: 2^29 exp(below / temperature) to the nearest integer, for a logit that lies `below`
// (<= 0) the largest one; `scale` is softmax_scale(temperature).
ALITOK_HOST_DEVICE float softmax_scale(float temperature) { return 0x1.715476p+0f / temperature; }  // log2(e) / T
ALITOK_HOST_DEVICE uint32_t softmax_weight(float below, float scale) {
  const float product = fmaf(below, scale, 0.0f);  // rounded on its own
  const float exponent = product > -64.0f ? product : -64.0f;
  const float whole = (exponent + 0x1.8p23f) - 0x1.8p23f;  // to the nearest integer
  const float y = (exponent - whole) * 0x1.62e43p-1f;      // |y| <= ln(2) / 2
  float power = fmaf(y, 1.0f / 720, 1.0f / 120);
  power = fmaf(y, power, 1.0f / 24);
  power = fmaf(y, power, 1.0f / 6);
  power = fmaf(y, power, 0.5f);
  power = fmaf(y, power, 1.0f);
  power = fmaf(y, power, 1.0f);
  const float unit = bits_float(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127 + 29) << 23);
  return static_cast<uint32_t>(static_cast<int32_t>(fmaf(power, unit, 0.5f)));
}

// Floats in the order of integers: value(key(x)) is x, and x < y makes key(x) < key(y). Not for NaN.
ALITOK_HOST_DEVICE int32_t order_key(float x) {
  const int32_t bits = static_cast<int32_t>(float_bits(x));
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
ALITOK_HOST_DEVICE float order_value(int32_t key) {
  return bits_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7FFFFFFF)));
}

// The largest t in [lowest, highest] that lets enough pass. `surplus(t)` says by its sign how what lies at or above t
// compares with what is wanted; it must not rise with t nor be negative at `lowest`. A surplus of 0 ends the search.
template <class Surplus>
ALITOK_HOST_DEVICE float largest_threshold(float lowest, float highest, const Surplus& surplus) {
  int64_t low = order_key(lowest), high = order_key(highest);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2 + 1;  // at most high
    const float t = order_value(static_cast<int32_t>(middle));
    const int64_t found = surplus(t);
    if (found == 0) return t;
    if (found > 0) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return order_value(static_cast<int32_t>(low));
}

}  // namespace alitok
