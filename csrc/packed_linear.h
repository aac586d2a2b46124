// What the linear layers with packed weights share (bf16_linear, int8_linear): x W^T + bias for the many rows of a
// tokenizer's pass on the CPU, with what stands before and after it in a transformer.
//
//   out = residual + gelu(norm(x) W^T + bias), each part but the product optional
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "parallel.h"

namespace alitok {

enum class LinearDtype : int { float32, bfloat16 };

struct PackedLinearParams {
  LinearDtype x_dtype, out_dtype;
  int64_t rows, inputs, outputs;
  const void* x;             // (rows, inputs)
  const float* norm_weight;  // (inputs), of a LayerNorm over each row of x, or null: none
  const float* norm_bias;    // (inputs)
  float norm_eps;
  const void* weight;     // packed, aligned to 64 bytes
  const float* bias;      // (outputs) or null
  bool gelu;              // the exact one, x Phi(x)
  const float* residual;  // (rows, outputs) or null; out is float32 then
  void* out;              // (rows, outputs)
};

// A row's result depends neither on the other rows nor on the number of threads, to the last bit.
ALITOK_DECLARE_PER_ISA(void bf16_linear_cpu(const PackedLinearParams&, const Parallel&));
ALITOK_DECLARE_PER_ISA(void int8_linear_cpu(const PackedLinearParams&, const Parallel&));

}  // namespace alitok
