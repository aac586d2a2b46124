// sample_tokens: one code for each image out of its logits (guidance, temperature, top-k, top-p, counter-based draw).
// The definition is sample_tokens_reference in alitok_fast/ops/sample_tokens.py. sample_tokens_next, on CUDA only, also
// writes the code into its sequence and feeds it next: sample_next_reference in alitok_fast/ops/decode.py.
#pragma once

#include <cstdint>
#include <optional>

#include "cpu_isa.h"
#include "parallel.h"

namespace alitok {

enum class LogitsDtype : int { float32, bfloat16, float16 };

struct SampleRule {
  float temperature;  // 0 is greedy, else in [1e-30, 1e30]
  int64_t top_k;      // >= 1; at least the number of codes keeps all
  double top_p;       // in (0, 1]; 1 keeps all
};

// Together with the code these determine the noise.
struct SampleKey {
  uint64_t seed, image_id;
  uint32_t step;
};

// What sample_tokens_next does with the code of each image. The step of the draw is the position of its token in the
// sequence; one outside of it, which the host does not know, changes nothing.
struct SampleNextParams {
  int64_t* tokens;  // (batch, length), -1 for a row that is no distribution; null: this is sample_tokens
  int64_t length;
  const int64_t* prompt_length;  // one element: tokens before this position are given, and stay
};

struct SampleTokensParams {
  LogitsDtype dtype;
  int64_t batch, codes;  // images; 1 <= codes <= 2^30
  // Row b at b * row_stride elements, aligned to one element only; with guidance row b + batch is its unconditional one.
  const void* logits;
  int64_t row_stride;
  // Null: no guidance; else image b's at b * guidance_stride, or in sample_tokens_next everyone's at the position.
  const float* guidance_scale;
  int64_t guidance_stride;  // 0 or 1
  SampleRule rule;
  const int64_t *seed, *image_ids, *step;  // one element, (batch), one element
  // (batch), -1 for a row that is no distribution. In sample_tokens_next 0 for it, and with guidance (2 batch), the same
  // twice.
  int64_t* ids;
  SampleNextParams next;
};

// The arguments of the operator as a rule. Throws std::invalid_argument, naming the one that is wrong.
SampleRule sample_rule(double temperature, std::optional<int64_t> top_k, std::optional<double> top_p, int64_t codes);

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
