// linear: a linear layer in bfloat16 over float32 or bfloat16 weights, forward and backward, for training. CPU only.
// The definition is linear_reference in alitok_fast/ops/linear.py.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "parallel.h"

namespace alitok {

struct LinearParams {
  int64_t rows, inputs, outputs;
  const uint16_t* x;   // (rows, inputs) bfloat16
  const void* weight;  // (outputs, inputs), rounded to bfloat16
  bool float_weight;   // float32, else bfloat16
  const float* bias;   // (outputs) or null
  uint16_t* out;       // (rows, outputs) bfloat16
};

// What is not wanted is null.
struct LinearBackwardParams {
  LinearParams forward;  // its bias and out are not used
  const uint16_t* grad;  // (rows, outputs) bfloat16
  uint16_t* grad_x;      // (rows, inputs) bfloat16
  float* grad_weight;    // (outputs, inputs), the sums as they are
  float* grad_bias;      // (outputs)
};

// Results are the same to the last bit for every number of threads.
ALITOK_DECLARE_PER_ISA(void linear_cpu(const LinearParams&, const Parallel&));
ALITOK_DECLARE_PER_ISA(void linear_backward_cpu(const LinearBackwardParams&, const Parallel&));

}  // namespace alitok
