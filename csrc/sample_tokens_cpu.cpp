// Guidance, temperature, top-k, top-p and draw on the CPU. Compiled once for each instruction set. The loops over codes
// are plain, in blocks that compilers turn into vectors; only Philox is written for an instruction set.
#include <limits>
#include <memory>

#include "sample_math.h"
#include "sample_tokens.h"
#include "scratch.h"
#include "simd.h"

namespace alitok::ALITOK_ISA {
namespace {

constexpr int kBlock = 64;  // codes; rows are padded to a multiple of it

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
float to_float(float x) { return x; }
float to_float(BFloat16 x) { return from_bf16(x.bits); }
float to_float(Float16 x) { return from_f16(x.bits); }

// Writes the row of image b, after guidance.
template <class T>
void load_row(const SampleTokensParams& p, int64_t b, float* out) {
  const T* c = static_cast<const T*>(p.logits) + b * p.row_stride;
  if (p.guidance_scale.data == nullptr) {
    for (int64_t k = 0; k < p.codes; ++k) out[k] = to_float(c[k]);
    return;
  }
  const T* u = c + p.batch * p.row_stride;
  const float scale = of_image(p.guidance_scale, b);
  for (int64_t k = 0; k < p.codes; ++k) out[k] = guided(to_float(c[k]), to_float(u[k]), scale);
}

// The largest logit; +inf if the row holds NaN or +inf.
float largest_logit(const float* x, int64_t size) {
  int32_t key = std::numeric_limits<int32_t>::min(), wrong = 0;
  for (int64_t k = 0; k < size; ++k) {
    const int32_t next = order_key(x[k]);  // integers: a loop over a float maximum is not turned into vectors
    key = next > key ? next : key;
    wrong |= !is_logit(x[k]);
  }
  return wrong ? kInfinity : order_value(key);
}

int64_t first_at(const float* x, float value) {
  for (const float* block = x;; block += kBlock) {
    int found = 0;
    for (int i = 0; i < kBlock; ++i) found |= block[i] == value;
    if (!found) continue;
    for (int i = 0;; ++i) {
      if (block[i] == value) return block - x + i;
    }
  }
}

void drop_below(float* x, int64_t size, float threshold) {
  for (int64_t k = 0; k < size; ++k) x[k] = x[k] < threshold ? -kInfinity : x[k];
}

void keep_top_k(float* x, int64_t size, float largest, int64_t top_k) {
  const float threshold = largest_threshold(-kInfinity, largest, [=](float t) {
    int32_t count = 0;
    for (int64_t k = 0; k < size; ++k) count += x[k] >= t;
    return count - top_k;
  });
  drop_below(x, size, threshold);
}

// The sum of the weights of what lies at or above t.
uint64_t mass_above(const float* x, const uint32_t* weight, int64_t size, float t) {
  constexpr int kLanes = kBlock / 4;
  uint64_t mass[kLanes] = {};
  for (int64_t start = 0; start < size; start += kBlock) {
    const float* block = x + start;
    const uint32_t* w = weight + start;
    uint32_t sum[kLanes];  // of four weights, each at most 2^29: 64 bits are needed only once a block
    for (int i = 0; i < kLanes; ++i) {
      sum[i] = (block[i] >= t ? w[i] : 0) + (block[i + kLanes] >= t ? w[i + kLanes] : 0) +
               (block[i + 2 * kLanes] >= t ? w[i + 2 * kLanes] : 0) +
               (block[i + 3 * kLanes] >= t ? w[i + 3 * kLanes] : 0);
    }
    for (int i = 0; i < kLanes; ++i) mass[i] += sum[i];
  }
  uint64_t total = 0;
  for (const uint64_t lane : mass) total += lane;
  return total;
}

void keep_top_p(float* x, int64_t size, float largest, const SampleRule& rule, uint32_t* weight) {
  const float scale = softmax_scale(rule.temperature);
  for (int64_t k = 0; k < size; ++k) weight[k] = softmax_weight(x[k] - largest, scale);
  const double wanted = rule.top_p * static_cast<double>(mass_above(x, weight, size, -kInfinity));
  const float threshold = largest_threshold(-kInfinity, largest, [=](float t) {
    return static_cast<double>(mass_above(x, weight, size, t)) >= wanted ? 1 : -1;
  });
  drop_below(x, size, threshold);
}

// argmax of x + temperature * noise, the lowest index on a tie. Exact noise is computed only where a cheap bound on it
// could still win; a block that cannot win with the largest noise there is does not even ask for random words.
int64_t draw(const float* x, int64_t size, float temperature, const SampleKey& key) {
  const float largest_noise = temperature * kGumbelLargest, bound_unit = temperature * kGumbelBoundUnit;
  const uint32_t id_low = static_cast<uint32_t>(key.image_id), id_high = static_cast<uint32_t>(key.image_id >> 32);
  float best = -kInfinity;
  int64_t best_code = -1;
  alignas(64) uint32_t word[kBlock];
  alignas(64) float bound[kBlock];
  for (int64_t start = 0; start < size; start += kBlock) {
    const float* block = x + start;
    int possible = 0;
    for (int i = 0; i < kBlock; ++i) possible |= block[i] + largest_noise > best;
    if (!possible) continue;
    for (int i = 0; i < kBlock; i += 4 * kPhiloxLanes) {
      philox4x32_stream(key.seed, static_cast<uint32_t>((start + i) / 4) | kPhiloxSample, key.step, id_low, id_high,
                        word + i);
    }
    possible = 0;
    for (int i = 0; i < kBlock; ++i) {
      bound[i] = block[i] + gumbel_bound(word[i]) * bound_unit;
      possible |= bound[i] > best;
    }
    if (!possible) continue;
    for (int i = 0; i < kBlock; ++i) {
      if (!(bound[i] > best)) continue;
      const float score = fmaf(temperature, gumbel(word[i]), block[i]);
      if (score > best) {
        best = score;
        best_code = start + i;
      }
    }
  }
  return best_code;
}

}  // namespace

void guide_row(const float* c, const float* u, float scale, int64_t codes, float* out) {
  for (int64_t k = 0; k < codes; ++k) out[k] = guided(c[k], u[k], scale);
}

int64_t sample_row(float* logits, uint32_t* weights, int64_t codes, const SampleRule& rule, const SampleKey& key) {
  const int64_t size = sample_row_size(codes);
  for (int64_t k = codes; k < size; ++k) logits[k] = -kInfinity;
  const float largest = largest_logit(logits, size);
  if (largest == kInfinity || largest == -kInfinity) return -1;
  if (rule.temperature == 0) return first_at(logits, largest);
  if (rule.top_k > 0 && rule.top_k < codes) keep_top_k(logits, size, largest, rule.top_k);
  if (rule.top_p < 1) keep_top_p(logits, size, largest, rule, weights);
  return draw(logits, size, rule.temperature, key);
}

void sample_tokens_cpu(const SampleTokensParams& p, const Parallel& parallel) {
  struct Row {
    explicit Row(int64_t size) : logits(size), weights(new uint32_t[static_cast<size_t>(size)]) {}
    FloatBuffer logits;
    std::unique_ptr<uint32_t[]> weights;
  };
  Scratch<Row> scratch(parallel, p.batch, sample_row_size(p.codes));
  constexpr int64_t kGrainCodes = 32768;  // torch's own grain, here some 30 microseconds
  parallel(0, p.batch, (kGrainCodes + p.codes - 1) / p.codes, [&](int64_t begin, int64_t end) {
    Row& row = scratch.take();
    for (int64_t b = begin; b < end; ++b) {
      switch (p.dtype) {
        case LogitsDtype::float32: load_row<float>(p, b, row.logits); break;
        case LogitsDtype::bfloat16: load_row<BFloat16>(p, b, row.logits); break;
        case LogitsDtype::float16: load_row<Float16>(p, b, row.logits); break;
      }
      const SampleKey key{static_cast<uint64_t>(of_image(p.settings.seed, b)),
                          static_cast<uint64_t>(of_image(p.settings.image_id, b)),
                          static_cast<uint32_t>(of_image(p.step, b))};
      p.ids[b] = sample_row(row.logits, row.weights.get(), p.codes, rule_of(p.settings, b), key);
    }
  });
}

}  // namespace alitok::ALITOK_ISA
