#include "add_rms_norm_cuda.cu"
#include "case.h"

void run_case(simt::Case& test) {
  alitok::AddRmsNormParams p{};
  p.dtype = static_cast<alitok::AddRmsNormDtype>(test.integer("dtype"));
  p.weight_dtype = static_cast<alitok::AddRmsNormDtype>(test.integer("weight_dtype"));
  p.dropout = test.dropout();
  p.rows = test.integer("rows");
  p.width = test.integer("width");
  p.x = test.input<float>("x");
  p.delta = test.input<void>("delta");
  p.weight = test.input<void>("weight");
  p.eps = 1e-5f;
  const int64_t size = p.rows * p.width, element = p.dtype == alitok::AddRmsNormDtype::float32 ? 4 : 2;
  if (test.has("backward")) {
    alitok::AddRmsNormBackwardParams b{};
    b.forward = p;
    b.grad_sum = test.input<float>("grad_sum");
    b.grad_normed = test.input<void>("grad_normed");
    b.grad_x = test.output<float>("grad_x", size);
    b.grad_delta = b.grad_sum == nullptr ? nullptr : test.output<unsigned char>("grad_delta", size * element);
    b.grad_weight = test.output<float>("grad_weight", p.width);
    b.workspace = test.workspace<float>(alitok::add_rms_norm_workspace_cuda(p));
    return alitok::add_rms_norm_backward_cuda(b, nullptr);
  }
  p.sum = p.delta == nullptr ? nullptr : test.output<float>("sum", size);
  p.normed = test.output<unsigned char>("normed", size * element);
  alitok::add_rms_norm_cuda(p, nullptr);
}
