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

ALITOK_DECLARE_PER_ISA(void swiglu_cpu(const SwigluParams&, const Parallel&));
void swiglu_cuda(const SwigluParams&, void* stream);

}  // namespace alitok
