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

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& weight,
                                        double eps) {
  check_dtype(x, "x", {ScalarType::Float});
  check_dim(x, "x", 2);
  check(x.size(0) < int64_t{1} << 31, "x", "fewer than 2^31 rows", "shape " + shape_name(x));
  check_contiguous(x, "x");
  check_dtype(weight, "weight", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_shape(weight, "weight", {x.size(1)});
  check_same_device(weight, "weight", x, "x");
  check_contiguous(weight, "weight");
  if (delta) {
    check_dtype(*delta, "delta", {weight.scalar_type()});
    check_shape(*delta, "delta", {x.size(0), x.size(1)});
    check_same_device(*delta, "delta", x, "x");
    check_contiguous(*delta, "delta");
  }
  // The result may not alias an argument: without delta the sum is a copy, which nobody should ask for (see the op).
  Tensor sum = delta ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor normed = torch::stable::new_empty(x, {x.size(0), x.size(1)}, weight.scalar_type());
  if (normed.numel() == 0) return {sum, normed};
  AddRmsNormParams p{};
  p.dtype = weight.scalar_type() == ScalarType::Float      ? AddRmsNormDtype::float32
            : weight.scalar_type() == ScalarType::BFloat16 ? AddRmsNormDtype::bfloat16
                                                           : AddRmsNormDtype::float16;
  p.rows = x.size(0);
  p.width = x.size(1);
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.delta = delta ? delta->const_data_ptr() : nullptr;
  p.weight = weight.const_data_ptr();
  p.eps = static_cast<float>(eps);
  p.sum = delta ? static_cast<float*>(sum.mutable_data_ptr()) : nullptr;
  p.normed = normed.mutable_data_ptr();
  if (x.is_cuda()) {
    ALITOK_DISPATCH_CUDA(add_rms_norm_cuda, x.get_device_index(), p);
  } else {
    ALITOK_DISPATCH_ISA(add_rms_norm_cpu, p, torch_parallel());
  }
  return {sum, normed};
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) { m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm)); }
STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) { m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm)); }

}  // namespace
}  // namespace alitok
