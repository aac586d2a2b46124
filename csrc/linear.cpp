// linear: checks, allocation, dispatch.
#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "torch_parallel.h"

namespace alitok {
namespace {

const uint16_t* bits(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }

LinearParams make_params(const Tensor& x, const Tensor& weight) {
  LinearParams p{};
  check_dtype(x, "x", {ScalarType::BFloat16});
  check_dim(x, "x", 2);
  check_contiguous(x, "x");
  check_dtype(weight, "weight", {ScalarType::Float, ScalarType::BFloat16});
  check_dim(weight, "weight", 2);
  check_size(weight, "weight", 1, x.size(1));
  check_contiguous(weight, "weight");
  p.rows = x.size(0);
  p.inputs = x.size(1);
  p.outputs = weight.size(0);
  p.x = bits(x);
  p.weight = weight.const_data_ptr();
  p.float_weight = weight.scalar_type() == ScalarType::Float;
  return p;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_tensors({{"x", x}, {"weight", weight}, {"bias", bias}});
  LinearParams p = make_params(x, weight);
  if (bias) {
    check_dtype(*bias, "bias", {ScalarType::Float});
    check_shape(*bias, "bias", {p.outputs});
    check_contiguous(*bias, "bias");
    p.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  Tensor out = torch::stable::new_empty(x, {p.rows, p.outputs}, ScalarType::BFloat16);
  if (out.numel() == 0) return out;
  p.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  ALITOK_DISPATCH_ISA(linear_cpu, p, torch_parallel());
  return out;
}

// `wanted`: the gradients of x, weight and bias; the others are empty. Those of weight and bias are float32.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                   const std::vector<bool>& wanted) {
  check_tensors({{"x", x}, {"grad", grad}, {"weight", weight}});
  check(wanted.size() == 3, "wanted", "3 flags", wanted.size());
  LinearBackwardParams b{};
  b.forward = make_params(x, weight);
  const LinearParams& p = b.forward;
  check_dtype(grad, "grad", {ScalarType::BFloat16});
  check_shape(grad, "grad", {p.rows, p.outputs});
  check_contiguous(grad, "grad");
  b.grad = bits(grad);
  const auto make = [&](bool want, int64_t rows, int64_t columns, ScalarType dtype) {
    return torch::stable::new_empty(x, {want ? rows : 0, columns}, dtype);
  };
  Tensor grad_x = make(wanted[0], p.rows, p.inputs, ScalarType::BFloat16);
  Tensor grad_weight = make(wanted[1], p.outputs, p.inputs, ScalarType::Float);
  Tensor grad_bias = torch::stable::new_empty(x, {wanted[2] ? p.outputs : 0}, ScalarType::Float);
  b.grad_x = grad_x.numel() > 0 ? static_cast<uint16_t*>(grad_x.mutable_data_ptr()) : nullptr;
  b.grad_weight = grad_weight.numel() > 0 ? static_cast<float*>(grad_weight.mutable_data_ptr()) : nullptr;
  b.grad_bias = grad_bias.numel() > 0 ? static_cast<float*>(grad_bias.mutable_data_ptr()) : nullptr;
  ALITOK_DISPATCH_ISA(linear_backward_cpu, b, torch_parallel());
  return {grad_x, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace
}  // namespace alitok
