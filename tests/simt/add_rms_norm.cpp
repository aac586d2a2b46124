#include "case.h"
#include "add_rms_norm_cuda.cu"

void run_case(simt::Case& test) {
  alitok::AddRmsNormParams p{};
  p.dtype = static_cast<alitok::AddRmsNormDtype>(test.integer("dtype"));
  p.rows = test.integer("rows");
  p.width = test.integer("width");
  p.x = test.input<float>("x");
  p.delta = test.input<void>("delta");
  p.weight = test.input<void>("weight");
  p.eps = 1e-5f;
  const int64_t size = p.rows * p.width;
  p.sum = p.delta == nullptr ? nullptr : test.output<float>("sum", size);
  p.normed = test.output<unsigned char>("normed", size * (p.dtype == alitok::AddRmsNormDtype::float32 ? 4 : 2));
  alitok::add_rms_norm_cuda(p, nullptr);
}
