// norm_head: the end of a generator's step for few rows, on CUDA alone: out = rms_norm(x) W^T + bias, all in float32.
// Weights, bias and the norm's weight are read before the kernel ahead has ended: they may be no result of a kernel
// that lets the next one begin early. The definition is norm_head_reference in alitok_fast/ops/norm_head.py.
#pragma once

#include <cstdint>

namespace alitok {

constexpr int64_t kNormHeadMostWidth = 1280;  // of a row: a lane holds its share of an output's weights in registers
constexpr int64_t kNormHeadMostRows = 32;

struct NormHeadParams {
  int64_t rows, width, outputs;  // width a multiple of 4

  const float* x;            // (rows, width); this and the next two 16-byte aligned
  const float* norm_weight;  // (width)
  const float* weight;       // (outputs, width)
  const float* bias;         // null, or (outputs)
  float norm_eps;

  float* out;  // (rows, outputs)
};

void norm_head_cuda(const NormHeadParams&, void* stream);

}  // namespace alitok
