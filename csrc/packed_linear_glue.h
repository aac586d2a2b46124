// Checks and allocation of the linear layers with packed weights; glue only. What differs between them is the shape and
// the dtype of the weights.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "packed_linear.h"
#include "torch_parallel.h"

namespace alitok {

struct PackedLinearArguments {
  const Tensor &x, &weight;
  const std::optional<Tensor>& bias;
  int64_t outputs;
  ScalarType dtype;
  const std::optional<Tensor>&norm_weight, &norm_bias;
  double norm_eps;
  bool gelu;
  const std::optional<Tensor>& residual;
};

inline LinearDtype linear_dtype(ScalarType dtype, const char* argument) {
  if (dtype == ScalarType::Float) return LinearDtype::float32;
  if (dtype == ScalarType::BFloat16) return LinearDtype::bfloat16;
  fail(argument, "float32 or bfloat16", dtype_name(dtype));
}

inline const float* check_vector(const std::optional<Tensor>& t, const char* argument, int64_t size) {
  if (!t) return nullptr;
  check_dtype(*t, argument, {ScalarType::Float});
  check_shape(*t, argument, {size});
  check_contiguous(*t, argument);
  return static_cast<const float*>(t->const_data_ptr());
}

// The result, computed by `kernel` where it has elements. `check_weight(weight, inputs)` looks at shape and dtype.
template <class CheckWeight, class Kernel>
Tensor packed_linear(const PackedLinearArguments& a, const CheckWeight& check_weight, const Kernel& kernel) {
  check_tensors({{"x", a.x},
                 {"weight", a.weight},
                 {"bias", a.bias},
                 {"norm_weight", a.norm_weight},
                 {"norm_bias", a.norm_bias},
                 {"residual", a.residual}});
  PackedLinearParams p{};
  p.x_dtype = linear_dtype(a.x.scalar_type(), "x");
  p.out_dtype = linear_dtype(a.dtype, "dtype");
  check_dim(a.x, "x", 2);
  check_contiguous(a.x, "x");
  p.rows = a.x.size(0);
  p.inputs = a.x.size(1);
  check(a.outputs >= 0, "outputs", "at least 0", a.outputs);
  check(a.outputs <= int64_t{1} << 40, "outputs", "at most 2^40", a.outputs);
  p.outputs = a.outputs;
  check_weight(a.weight, p.inputs);
  check_contiguous(a.weight, "weight");
  p.bias = check_vector(a.bias, "bias", p.outputs);
  p.norm_weight = check_vector(a.norm_weight, "norm_weight", p.inputs);
  p.norm_bias = check_vector(a.norm_bias, "norm_bias", p.inputs);
  check(a.norm_weight.has_value() == a.norm_bias.has_value(), "norm_bias", "a tensor exactly where norm_weight is one",
        a.norm_bias ? "one alone" : "None");
  p.norm_eps = static_cast<float>(a.norm_eps);
  p.gelu = a.gelu;
  if (a.residual) {
    check(p.out_dtype == LinearDtype::float32, "dtype", "float32 with a residual", dtype_name(a.dtype));
    check_dtype(*a.residual, "residual", {ScalarType::Float});
    check_shape(*a.residual, "residual", {p.rows, p.outputs});
    check_contiguous(*a.residual, "residual");
    p.residual = static_cast<const float*>(a.residual->const_data_ptr());
  }
  Tensor out = torch::stable::new_empty(a.x, {p.rows, p.outputs}, a.dtype);
  if (out.numel() == 0) return out;
  p.x = a.x.const_data_ptr();
  p.weight = a.weight.const_data_ptr();
  check(reinterpret_cast<uintptr_t>(p.weight) % 64 == 0, "weight", "data aligned to 64 bytes", "data that are not");
  p.out = out.mutable_data_ptr();
  kernel(p, torch_parallel());
  return out;
}

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace alitok
