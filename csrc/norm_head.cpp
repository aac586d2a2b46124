// norm_head: checks, allocation, dispatch. CUDA only: elsewhere alitok_fast/ops/norm_head.py uses other operators.
#include "norm_head.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "cuda_stream.h"

namespace alitok {
namespace {

// Contiguous float32 that can be read 16 bytes at a time.
const float* read_by_fours(const Tensor& tensor, const char* name) {
  check_dtype(tensor, name, {ScalarType::Float});
  check_contiguous(tensor, name);
  check(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name, "memory aligned to 16 bytes",
        "a view that is not");
  return static_cast<const float*>(tensor.const_data_ptr());
}

Tensor norm_head(const Tensor& x, const Tensor& norm_weight, double norm_eps, const Tensor& weight,
                 const std::optional<Tensor>& bias) {
  check_tensors({{"x", x}, {"norm_weight", norm_weight}, {"weight", weight}, {"bias", bias}});
  NormHeadParams p{};
  check_dim(x, "x", 2);
  check(x.size(0) <= kNormHeadMostRows, "x", "at most " + std::to_string(kNormHeadMostRows) + " rows",
        "shape " + shape_name(x));
  check(x.size(1) % 4 == 0 && x.size(1) <= kNormHeadMostWidth, "x",
        "a width of at most " + std::to_string(kNormHeadMostWidth) + ", a multiple of 4", "shape " + shape_name(x));
  p.x = read_by_fours(x, "x");
  p.rows = x.size(0);
  p.width = x.size(1);
  check_shape(norm_weight, "norm_weight", {p.width});
  p.norm_weight = read_by_fours(norm_weight, "norm_weight");
  p.norm_eps = static_cast<float>(norm_eps);
  check_dim(weight, "weight", 2);
  check(weight.size(0) < int64_t{1} << 31, "weight", "fewer than 2^31 outputs", "shape " + shape_name(weight));
  check_size(weight, "weight", 1, p.width);
  p.weight = read_by_fours(weight, "weight");
  p.outputs = weight.size(0);
  if (bias) {
    check_dtype(*bias, "bias", {ScalarType::Float});
    check_shape(*bias, "bias", {p.outputs});
    check_contiguous(*bias, "bias");
    p.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  Tensor out = torch::stable::new_empty(x, {p.rows, p.outputs});
  if (out.numel() == 0) return out;
  p.out = static_cast<float*>(out.mutable_data_ptr());
  ALITOK_DISPATCH_CUDA(norm_head_cuda, x.get_device_index(), p);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) { m.impl("norm_head", TORCH_BOX(&norm_head)); }

}  // namespace
}  // namespace alitok
