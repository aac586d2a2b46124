// int8_linear: checks, allocation, dispatch.
#include "int8_linear.h"

#include "packed_linear_glue.h"

namespace alitok {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor int8_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t outputs, ScalarType dtype,
                   const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, bool gelu,
                   const OptionalTensor& residual) {
  return packed_linear(
      {x, weight, bias, outputs, dtype, norm_weight, norm_bias, norm_eps, gelu, residual},
      [&](const Tensor& packed, int64_t inputs) {
        check_dtype(packed, "weight", {ScalarType::Byte});
        check_shape(packed, "weight",
                    {parts(outputs, kInt8PanelOutputs), parts(inputs, kInt8GroupInputs), kInt8GroupBytes});
      },
      [](const PackedLinearParams& p, const Parallel& parallel) { ALITOK_DISPATCH_ISA(int8_linear_cpu, p, parallel); });
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) { m.impl("int8_linear", TORCH_BOX(&int8_linear)); }

}  // namespace
}  // namespace alitok
