// fused_linear: a linear layer of a sampling step with what surrounds it, for few rows, on CUDA alone:
//   out = [rms_norm] x W^T + bias
//   out = silu([rms_norm] x G^T) * ([rms_norm] x W^T + bias)
//   x = table[ids], out = rms_norm(x) W^T + bias
//   residual += x W^T + bias
// Weights, scales, biases and the norm's weights are read before the kernel ahead has ended: they may be no result of a
// kernel that lets the next one begin early. The definition is fused_linear_reference in alitok_fast/ops/fused_linear.py.
#pragma once

#include <cstdint>

namespace alitok {

enum class FusedLinearDtype : int { float32, bfloat16, float16, int8, e4m3 };

constexpr int64_t kFusedLinearGroup = 64;         // inputs of an output that share a scale
constexpr int64_t kFusedLinearMostNormed = 1280;  // inputs of a row that a warp normalises in registers
constexpr int64_t kFusedLinearMostRows = 128;
constexpr int64_t kFusedLinearMostShared = 4096;  // inputs that the blocks of a cluster share

struct FusedLinearParams {
  FusedLinearDtype dtype;         // of out, bias, norm_weight, and of x where there is no norm: bfloat16 or float16
  FusedLinearDtype weight_dtype;  // `dtype`, or int8 or e4m3 with scales
  int64_t rows, inputs, outputs;  // inputs a multiple of 64

  const void* x;       // (rows, inputs); float32 where there is a norm, and then at most kFusedLinearMostNormed
  const int64_t* ids;  // null, or (rows): x is a table of `vocabulary` rows, of which these are taken where there is a
  int64_t vocabulary;  // norm; what is no row of it gives NaN
  float* stream;       // beside ids: (rows, inputs), where they are written
  const void* norm_weight;  // null, or (inputs), 16-byte aligned
  float norm_eps;
  const void *weight, *gate;  // (outputs, inputs), 16-byte aligned; gate may be null, and is where there is no norm
  const void *scale, *gate_scale;  // (outputs, inputs / 64) bfloat16 beside 8-bit weights, else null
  const void* bias;                // null, or (outputs)

  void* out;        // (rows, outputs), or
  float* residual;  // (rows, outputs), which the result is added to: one of the two, and no gate with it
};

void fused_linear_cuda(const FusedLinearParams&, void* stream);
// The same by clusters of blocks, on devices of compute capability 9.0 and later, for at most kFusedLinearMostShared inputs
// and a multiple of 8 outputs; a residual is 16-byte aligned.
void fused_linear_sm90(const FusedLinearParams&, void* stream);

}  // namespace alitok
