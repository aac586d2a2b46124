// swiglu: silu(gate) * up, element by element.
// The definition is swiglu_reference in alitok_fast/ops/swiglu.py.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "parallel.h"

namespace alitok {

enum class SwigluDtype : int { float32, bfloat16, float16 };

struct SwigluParams {
  SwigluDtype dtype;
  int64_t size;
  const void *gate, *up;
  void* out;
};

struct SwigluBackwardParams {
  SwigluParams forward;  // its out is not used
  const void* grad;
  void *grad_gate, *grad_up;
};

ALITOK_DECLARE_PER_ISA(void swiglu_cpu(const SwigluParams&, const Parallel&));
ALITOK_DECLARE_PER_ISA(void swiglu_backward_cpu(const SwigluBackwardParams&, const Parallel&));
void swiglu_cuda(const SwigluParams&, void* stream);
void swiglu_backward_cuda(const SwigluBackwardParams&, void* stream);

}  // namespace alitok
