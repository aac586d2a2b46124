// quantized_linear: checks, allocation, dispatch.
#include "quantized_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "cuda_stream.h"
#include "torch_parallel.h"

namespace alitok {
namespace {

QuantizedLinearDtype quantized_linear_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return QuantizedLinearDtype::bfloat16;
    case ScalarType::Half: return QuantizedLinearDtype::float16;
    case ScalarType::Char: return QuantizedLinearDtype::int8;
    case ScalarType::Float8_e4m3fn: return QuantizedLinearDtype::e4m3;
    default: return QuantizedLinearDtype::float32;
  }
}

void check_weight(const Tensor& weight, const Tensor& scale) {
  check_dtype(weight, "weight", {ScalarType::Char, ScalarType::Float8_e4m3fn});
  check_dim(weight, "weight", 2);
  check(weight.size(0) < int64_t{1} << 31, "weight", "fewer than 2^31 outputs", "shape " + shape_name(weight));
  check_contiguous(weight, "weight");
  check_dtype(scale, "scale", {ScalarType::BFloat16});
  const int64_t groups = (weight.size(1) + kQuantizedLinearGroup - 1) / kQuantizedLinearGroup;
  check_shape(scale, "scale", {weight.size(0), groups});
  check_contiguous(scale, "scale");
}

Tensor quantized_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias) {
  check_tensors({{"x", x}, {"weight", weight}, {"scale", scale}, {"bias", bias}});
  check_dtype(x, "x", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_dim(x, "x", 2);
  check(x.size(0) <= kQuantizedLinearMostRows, "x", "at most " + std::to_string(kQuantizedLinearMostRows) + " rows",
        "shape " + shape_name(x));
  check_contiguous(x, "x");
  check_weight(weight, scale);
  check_size(weight, "weight", 1, x.size(1));
  if (bias) {
    check_dtype(*bias, "bias", {x.scalar_type()});
    check_shape(*bias, "bias", {weight.size(0)});
    check_contiguous(*bias, "bias");
  }
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (out.numel() == 0) return out;
  QuantizedLinearParams p{};
  p.dtype = quantized_linear_dtype(x.scalar_type());
  p.weight_dtype = quantized_linear_dtype(weight.scalar_type());
  p.rows = x.size(0);
  p.inputs = x.size(1);
  p.outputs = weight.size(0);
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.scale = scale.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  if (x.is_cuda()) {
    ALITOK_DISPATCH_CUDA(quantized_linear_cuda, x.get_device_index(), p);
  } else {
    ALITOK_DISPATCH_ISA(quantized_linear_cpu, p, torch_parallel());
  }
  return out;
}

Tensor quantized_linear_widen(const Tensor& weight, const Tensor& scale, ScalarType dtype) {
  check_tensors({{"weight", weight}, {"scale", scale}});
  check_weight(weight, scale);
  Tensor out = torch::stable::new_empty(weight, {weight.size(0), weight.size(1)}, dtype);
  check_dtype(out, "dtype", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  if (out.numel() == 0) return out;
  WidenParams p{};
  p.dtype = quantized_linear_dtype(dtype);
  p.weight_dtype = quantized_linear_dtype(weight.scalar_type());
  p.inputs = weight.size(1);
  p.outputs = weight.size(0);
  p.weight = weight.const_data_ptr();
  p.scale = scale.const_data_ptr();
  p.out = out.mutable_data_ptr();
  ALITOK_DISPATCH_CUDA(widen_cuda, weight.get_device_index(), p);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) { m.impl("quantized_linear", TORCH_BOX(&quantized_linear)); }
STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("quantized_linear_widen", TORCH_BOX(&quantized_linear_widen));
}

}  // namespace
}  // namespace alitok
