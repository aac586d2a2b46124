// A case of fused_linear, for its two kernels.
#pragma once

#include "case.h"
#include "fused_linear.h"

inline alitok::FusedLinearParams fused_linear_params(simt::Case& test) {
  using alitok::FusedLinearDtype;
  alitok::FusedLinearParams p{};
  p.dtype = static_cast<FusedLinearDtype>(test.integer("dtype"));
  p.weight_dtype = static_cast<FusedLinearDtype>(test.integer("weight_dtype"));
  p.rows = test.integer("rows");
  p.inputs = test.integer("inputs");
  p.outputs = test.integer("outputs");
  p.x = test.input<void>("x");
  p.ids = test.input<int64_t>("ids");
  if (p.ids != nullptr) {
    p.vocabulary = test.integer("vocabulary");
    p.stream = test.output<float>("stream", p.rows * p.inputs);
  }
  p.norm_weight = test.input<void>("norm_weight");
  p.norm_eps = 1e-5f;
  p.weight = test.input<void>("weight");
  p.gate = test.input<void>("gate");
  p.scale = test.input<void>("scale");
  p.gate_scale = test.input<void>("gate_scale");
  p.bias = test.input<void>("bias");
  if (test.integer("add") != 0) {
    p.residual = test.inout<float>("residual");
  } else {
    p.out = test.output<unsigned char>("out", p.rows * p.outputs * 2);
  }
  return p;
}
