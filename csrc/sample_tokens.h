// sample_tokens: one code for each image out of its logits (guidance, temperature, top-k, top-p, counter-based draw).
// The definition is sample_tokens_reference in alitok_fast/ops/sample_tokens.py. sample_tokens_next, on CUDA only, draws
// for a window of positions of each image, keeps what was guessed rightly, and feeds the next pass: sample_next_reference
// in alitok_fast/ops/decode.py.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "host_device.h"
#include "parallel.h"

namespace alitok {

enum class LogitsDtype : int { float32, bfloat16, float16 };

struct SampleRule {
  float temperature;  // 0 is greedy, else in [1e-30, 1e30]
  int64_t top_k;      // >= 0; 0, or at least the number of codes, keeps all
  double top_p;       // in (0, 1]; 1 keeps all
};
ALITOK_HOST_DEVICE bool is_temperature(float t) { return t == 0 || (t >= 1e-30f && t <= 1e30f); }
ALITOK_HOST_DEVICE bool is_top_p(double p) { return p > 0 && p <= 1; }
// Where the values lie on a device, the kernel looks: an image with others is marked, as a row that is no distribution.
ALITOK_HOST_DEVICE bool is_rule(const SampleRule& r) {
  return is_temperature(r.temperature) && r.top_k >= 0 && is_top_p(r.top_p);
}
ALITOK_HOST_DEVICE bool filters(const SampleRule& r, int64_t codes) {
  return r.temperature > 0 && ((r.top_k > 0 && r.top_k < codes) || r.top_p < 1);
}

// One element for each image, or one for all.
template <class T>
struct PerImage {
  const T* data;
  int64_t stride;  // 1 or 0
};
template <class T>
ALITOK_HOST_DEVICE T of_image(const PerImage<T>& values, int64_t image) {
  return values.data[image * values.stride];
}

// How each image is drawn.
struct SampleSettings {
  PerImage<float> temperature;
  PerImage<int64_t> top_k;
  PerImage<double> top_p;
  PerImage<int64_t> seed, image_id;
};
ALITOK_HOST_DEVICE SampleRule rule_of(const SampleSettings& s, int64_t image) {
  return {of_image(s.temperature, image), of_image(s.top_k, image), of_image(s.top_p, image)};
}

// Together with the code these determine the noise.
struct SampleKey {
  uint64_t seed, image_id;
  uint32_t step;
};

// What sample_tokens_next does with the draws of each image. A position outside of the sequence, which the host does not
// know, changes nothing, and so the image rests.
struct SampleNextParams {
  int64_t* tokens;  // (batch, length), -1 for a row that is no distribution; null: this is sample_tokens
  int64_t length, columns, window;   // tokens of an image; columns of ids, and how many of them the logits are for
  const int64_t* prompt_lengths;     // (batch): tokens before this position are given, and stay
  int64_t *positions, *passes_done;  // (rows), (batch)
  int64_t* draws;                    // (batch, window), where window > 1
};

struct SampleTokensParams {
  LogitsDtype dtype;
  int64_t batch, codes;  // images; 1 <= codes <= 2^30
  // Row b at b * row_stride elements, aligned to one element only; with guidance row b + batch is its unconditional one.
  // In sample_tokens_next each row has `window` of them, row_stride apart.
  const void* logits;
  int64_t row_stride;
  // Null: no guidance; in sample_tokens_next (batch, length), and of each image the one at its position.
  PerImage<float> guidance_scale;
  SampleSettings settings;
  PerImage<int64_t> step;  // not in sample_tokens_next
  // (batch), -1 for a row that is no distribution. In sample_tokens_next (rows, columns), what the next pass is fed.
  int64_t* ids;
  SampleNextParams next;
};

ALITOK_DECLARE_PER_ISA(void sample_tokens_cpu(const SampleTokensParams&, const Parallel&));

// The same for one row, for kernels that have the logits at hand. `logits` holds `codes` floats, after guidance, with
// room for sample_row_size(codes); it is overwritten. So are as many `weights`, which top_p below 1 needs.
constexpr int64_t sample_row_size(int64_t codes) { return (codes + 63) / 64 * 64; }
ALITOK_DECLARE_PER_ISA(int64_t sample_row(float* logits, uint32_t* weights, int64_t codes, const SampleRule&,
                                          const SampleKey&));

// u + (c - u) * scale, -inf where either is; c, u of float32. `out` may be one of the two.
ALITOK_DECLARE_PER_ISA(void guide_row(const float* c, const float* u, float scale, int64_t codes, float* out));

void sample_tokens_cuda(const SampleTokensParams&, void* stream);

}  // namespace alitok
