// int8_linear: checks, allocation, dispatch.
#include "int8_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "torch_parallel.h"

namespace alitok {
namespace {

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

Int8LinearDtype int8_linear_dtype(ScalarType dtype, const char* argument) {
  if (dtype == ScalarType::Float) return Int8LinearDtype::float32;
  if (dtype == ScalarType::BFloat16) return Int8LinearDtype::bfloat16;
  fail(argument, "float32 or bfloat16", dtype_name(dtype));
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs,
                   ScalarType dtype) {
  check_tensors({{"x", x}, {"weight", weight}, {"bias", bias}});
  Int8LinearParams p{};
  p.x_dtype = int8_linear_dtype(x.scalar_type(), "x");
  p.out_dtype = int8_linear_dtype(dtype, "dtype");
  check_dim(x, "x", 2);
  check_contiguous(x, "x");
  check(outputs >= 0, "outputs", "at least 0", outputs);
  check(outputs <= int64_t{1} << 40, "outputs", "at most 2^40", outputs);
  check_dtype(weight, "weight", {ScalarType::Byte});
  check_shape(weight, "weight",
              {parts(outputs, kInt8PanelOutputs), parts(x.size(1), kInt8GroupInputs), kInt8GroupBytes});
  check_contiguous(weight, "weight");
  if (bias) {
    check_dtype(*bias, "bias", {ScalarType::Float});
    check_shape(*bias, "bias", {outputs});
    check_contiguous(*bias, "bias");
  }
  Tensor out = torch::stable::new_empty(x, {x.size(0), outputs}, dtype);
  if (out.numel() == 0) return out;
  p.rows = x.size(0);
  p.inputs = x.size(1);
  p.outputs = outputs;
  p.x = x.const_data_ptr();
  p.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  check(reinterpret_cast<uintptr_t>(p.weight) % 64 == 0, "weight", "data aligned to 64 bytes", "data that are not");
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.out = out.mutable_data_ptr();
  ALITOK_DISPATCH_ISA(int8_linear_cpu, p, torch_parallel());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) { m.impl("int8_linear", TORCH_BOX(&int8_linear)); }

}  // namespace
}  // namespace alitok
