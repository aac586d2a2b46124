// add_rms_norm: the residual addition, with dropout on what is added, and the norm behind it, in one pass.
// The definition is add_rms_norm_reference in alitok_fast/ops/add_rms_norm.py.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "dropout.h"
#include "parallel.h"

namespace alitok {

enum class AddRmsNormDtype : int { float32, bfloat16, float16 };

struct AddRmsNormParams {
  AddRmsNormDtype dtype;         // of delta, normed and their gradients
  AddRmsNormDtype weight_dtype;  // `dtype` or float32
  int64_t rows, width;           // all (rows, width) contiguous; rows below 2^31, a CUDA block each
  const float* x;
  const void* delta;   // null: nothing is added, and sum is not written
  const void* weight;  // (width)
  float eps;
  Dropout dropout;  // on delta
  float* sum;
  void* normed;
};

struct AddRmsNormBackwardParams {
  AddRmsNormParams forward;  // its x is the sum; delta, sum and normed are not used
  const float* grad_sum;     // null where nothing was added
  const void* grad_normed;
  float* grad_x;
  void* grad_delta;    // null where nothing was added
  float* grad_weight;  // (width)
  void* workspace;     // floats, as many as the *_workspace function says
};

ALITOK_DECLARE_PER_ISA(void add_rms_norm_cpu(const AddRmsNormParams&, const Parallel&));
ALITOK_DECLARE_PER_ISA(void add_rms_norm_backward_cpu(const AddRmsNormBackwardParams&, const Parallel&));
void add_rms_norm_cuda(const AddRmsNormParams&, void* stream);
void add_rms_norm_backward_cuda(const AddRmsNormBackwardParams&, void* stream);

// Rows are cut into parts by their number alone, and the parts of grad_weight are summed in a fixed order: the same bits
// in every run and for every number of threads. On CUDA a part is a block's: about as many as an H100 holds at once with
// the rows of B, so that few are left over for a second turn.
inline int64_t add_rms_norm_parts_cpu(int64_t rows) { return rows < 64 ? 1 : rows < 64 * 1024 ? rows / 64 : 1024; }
inline int64_t add_rms_norm_parts_cuda(int64_t rows) { return rows < 1024 ? rows : 1024; }

// A sum of each part.
inline int64_t add_rms_norm_workspace_cpu(const AddRmsNormParams& p) {
  return add_rms_norm_parts_cpu(p.rows) * p.width;
}
inline int64_t add_rms_norm_workspace_cuda(const AddRmsNormParams& p) {
  return add_rms_norm_parts_cuda(p.rows) * p.width;
}

}  // namespace alitok
