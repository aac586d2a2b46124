// add_rms_norm: checks, allocation, dispatch.
#include "add_rms_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "cuda_stream.h"
#include "torch_parallel.h"

namespace alitok {
namespace {

using OptionalTensor = std::optional<Tensor>;

AddRmsNormDtype add_rms_norm_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float      ? AddRmsNormDtype::float32
         : dtype == ScalarType::BFloat16 ? AddRmsNormDtype::bfloat16
                                         : AddRmsNormDtype::float16;
}

// A (rows, width) argument like x, in one of `dtypes`.
void check_rows(const Tensor& t, const char* argument, const Tensor& x, std::initializer_list<ScalarType> dtypes) {
  check_dtype(t, argument, dtypes);
  check_shape(t, argument, {x.size(0), x.size(1)});
  check_contiguous(t, argument);
}

// What forward and backward share: x, weight, eps and, where something was added, dropout.
AddRmsNormParams make_params(const Tensor& x, ScalarType dtype, const Tensor& weight, double eps, bool added,
                             double dropout, const OptionalTensor& seed) {
  check_dtype(x, "x", {ScalarType::Float});
  check_dim(x, "x", 2);
  check(x.size(0) < int64_t{1} << 31, "x", "fewer than 2^31 rows", "shape " + shape_name(x));
  check_contiguous(x, "x");
  check_dtype(weight, "weight", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_shape(weight, "weight", {x.size(1)});
  check_contiguous(weight, "weight");
  AddRmsNormParams p{};
  p.dtype = add_rms_norm_dtype(dtype);
  p.weight_dtype = add_rms_norm_dtype(weight.scalar_type());
  p.rows = x.size(0);
  p.width = x.size(1);
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.weight = weight.const_data_ptr();
  p.eps = static_cast<float>(eps);
  p.dropout = check_dropout(dropout, seed);
  check(added || dropout == 0, "dropout", "0 where delta is None", dropout);
  return p;
}

// float32 weights go with any delta: the master weights of mixed precision.
std::initializer_list<ScalarType> dtypes_beside(const Tensor& weight) {
  static constexpr std::initializer_list<ScalarType> any = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  static constexpr std::initializer_list<ScalarType> bfloat16 = {ScalarType::BFloat16}, float16 = {ScalarType::Half};
  return weight.scalar_type() == ScalarType::BFloat16 ? bfloat16
         : weight.scalar_type() == ScalarType::Half   ? float16
                                                      : any;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const OptionalTensor& delta, const Tensor& weight, double eps,
                                        double dropout, const OptionalTensor& seed) {
  check_tensors({{"x", x}, {"delta", delta}, {"weight", weight}, {"seed", seed}});
  const ScalarType dtype = delta ? delta->scalar_type() : weight.scalar_type();
  AddRmsNormParams p = make_params(x, dtype, weight, eps, delta.has_value(), dropout, seed);
  if (delta) check_rows(*delta, "delta", x, dtypes_beside(weight));
  // The result may not alias an argument: without delta the sum is a copy, which nobody should ask for (see the op).
  Tensor sum = delta ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor normed = torch::stable::new_empty(x, {x.size(0), x.size(1)}, dtype);
  if (normed.numel() == 0) return {sum, normed};
  p.delta = delta ? delta->const_data_ptr() : nullptr;
  p.sum = delta ? static_cast<float*>(sum.mutable_data_ptr()) : nullptr;
  p.normed = normed.mutable_data_ptr();
  if (x.is_cuda()) {
    ALITOK_DISPATCH_CUDA(add_rms_norm_cuda, x.get_device_index(), p);
  } else {
    ALITOK_DISPATCH_ISA(add_rms_norm_cpu, p, torch_parallel());
  }
  return {sum, normed};
}

// `x` is the sum that the forward pass gave, or its x where nothing was added: then grad_sum is None and grad_delta empty.
// grad_weight is float32.
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_backward(const OptionalTensor& grad_sum, const Tensor& grad_normed,
                                                         const Tensor& x, const Tensor& weight, double eps,
                                                         double dropout, const OptionalTensor& seed) {
  check_tensors({{"x", x}, {"grad_sum", grad_sum}, {"grad_normed", grad_normed}, {"weight", weight}, {"seed", seed}});
  AddRmsNormBackwardParams b{};
  b.forward = make_params(x, grad_normed.scalar_type(), weight, eps, grad_sum.has_value(), dropout, seed);
  check_rows(grad_normed, "grad_normed", x, dtypes_beside(weight));
  if (grad_sum) check_rows(*grad_sum, "grad_sum", x, {ScalarType::Float});
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_delta = grad_sum ? torch::stable::empty_like(grad_normed) : torch::stable::new_empty(grad_normed, {0});
  Tensor grad_weight = torch::stable::new_zeros(x, {x.size(1)}, ScalarType::Float);
  if (x.numel() == 0) return {grad_x, grad_delta, grad_weight};
  b.grad_sum = grad_sum ? static_cast<const float*>(grad_sum->const_data_ptr()) : nullptr;
  b.grad_normed = grad_normed.const_data_ptr();
  b.grad_x = static_cast<float*>(grad_x.mutable_data_ptr());
  b.grad_delta = grad_sum ? grad_delta.mutable_data_ptr() : nullptr;
  b.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  const int64_t needed = x.is_cuda() ? add_rms_norm_workspace_cuda(b.forward) : add_rms_norm_workspace_cpu(b.forward);
  const Tensor workspace = torch::stable::new_empty(x, {needed}, ScalarType::Float);
  b.workspace = workspace.mutable_data_ptr();
  if (x.is_cuda()) {
    ALITOK_DISPATCH_CUDA(add_rms_norm_backward_cuda, x.get_device_index(), b);
  } else {
    ALITOK_DISPATCH_ISA(add_rms_norm_backward_cpu, b, torch_parallel());
  }
  return {grad_x, grad_delta, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) {
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
}
STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) {
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
}

}  // namespace
}  // namespace alitok
