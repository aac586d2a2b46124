#include "case.h"
#include "norm_head_cuda.cu"

void run_case(simt::Case& test) {
  alitok::NormHeadParams p{};
  p.rows = test.integer("rows");
  p.width = test.integer("width");
  p.outputs = test.integer("outputs");
  p.x = test.input<float>("x");
  p.norm_weight = test.input<float>("norm_weight");
  p.weight = test.input<float>("weight");
  p.bias = test.input<float>("bias");
  p.norm_eps = 1e-5f;
  p.out = test.output<float>("out", p.rows * p.outputs);
  alitok::norm_head_cuda(p, nullptr);
}
