// bf16_linear: checks, allocation, dispatch.
#include "bf16_linear.h"

#include "packed_linear_glue.h"

namespace alitok {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor bf16_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t outputs, ScalarType dtype,
                   const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, bool gelu,
                   const OptionalTensor& residual) {
  return packed_linear(
      {x, weight, bias, outputs, dtype, norm_weight, norm_bias, norm_eps, gelu, residual},
      [&](const Tensor& packed, int64_t inputs) {
        check_dtype(packed, "weight", {ScalarType::BFloat16});
        check_shape(packed, "weight",
                    {parts(outputs, kBf16PanelOutputs), parts(inputs, kBf16StepInputs), kBf16StepElements});
      },
      [](const PackedLinearParams& p, const Parallel& parallel) { ALITOK_DISPATCH_ISA(bf16_linear_cpu, p, parallel); });
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) { m.impl("bf16_linear", TORCH_BOX(&bf16_linear)); }

}  // namespace
}  // namespace alitok
