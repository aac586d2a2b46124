#include "case.h"
#include "swiglu_cuda.cu"

void run_case(simt::Case& test) {
  alitok::SwigluParams p{};
  p.dtype = static_cast<alitok::SwigluDtype>(test.integer("dtype"));
  p.size = test.integer("size");
  const int64_t bytes = p.size * (p.dtype == alitok::SwigluDtype::float32 ? 4 : 2);
  p.gate = test.input<void>("gate");
  p.up = test.input<void>("up");
  if (test.has("backward")) {
    alitok::SwigluBackwardParams b{p, test.input<void>("grad"), test.output<unsigned char>("grad_gate", bytes),
                                   test.output<unsigned char>("grad_up", bytes)};
    alitok::swiglu_backward_cuda(b, nullptr);
    return;
  }
  p.out = test.output<unsigned char>("out", bytes);
  alitok::swiglu_cuda(p, nullptr);
}
