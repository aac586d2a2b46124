// add_rms_norm: the residual addition and the norm behind it, in one pass.
// The definition is add_rms_norm_reference in alitok_fast/ops/add_rms_norm.py.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "parallel.h"

namespace alitok {

enum class AddRmsNormDtype : int { float32, bfloat16, float16 };

struct AddRmsNormParams {
  AddRmsNormDtype dtype;  // of delta, weight and normed
  int64_t rows, width;    // all (rows, width) contiguous; rows below 2^31, a CUDA block each
  const float* x;
  const void* delta;   // null: nothing is added, and sum is not written
  const void* weight;  // (width)
  float eps;
  float* sum;
  void* normed;
};

ALITOK_DECLARE_PER_ISA(void add_rms_norm_cpu(const AddRmsNormParams&, const Parallel&));
void add_rms_norm_cuda(const AddRmsNormParams&, void* stream);

}  // namespace alitok
