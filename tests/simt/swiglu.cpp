#include "case.h"
#include "swiglu_cuda.cu"

void run_case(simt::Case& test) {
  alitok::SwigluParams p{};
  p.dtype = static_cast<alitok::SwigluDtype>(test.integer("dtype"));
  p.size = test.integer("size");
  p.gate = test.input<void>("gate");
  p.up = test.input<void>("up");
  p.out = test.output<unsigned char>("out", p.size * (p.dtype == alitok::SwigluDtype::float32 ? 4 : 2));
  alitok::swiglu_cuda(p, nullptr);
}
