// swiglu: checks, allocation, dispatch.
#include "swiglu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cuda_stream.h"
#include "torch_parallel.h"

namespace alitok {
namespace {

// Kernels move 16 bytes at a time; a view may begin anywhere.
void check_aligned(const Tensor& t, const char* argument) {
  check(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, argument, "memory aligned to 16 bytes",
        "a view that is not");
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check_tensors({{"gate", gate}, {"up", up}});
  check_dtype(gate, "gate", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_dtype(up, "up", {gate.scalar_type()});
  check(shape_name(up) == shape_name(gate), "up", "shape " + shape_name(gate), shape_name(up));
  check_contiguous(gate, "gate");
  check_contiguous(up, "up");
  Tensor out = torch::stable::empty_like(gate);
  if (out.numel() == 0) return out;
  SwigluParams p{};
  p.dtype = gate.scalar_type() == ScalarType::Float      ? SwigluDtype::float32
            : gate.scalar_type() == ScalarType::BFloat16 ? SwigluDtype::bfloat16
                                                         : SwigluDtype::float16;
  p.size = gate.numel();
  p.gate = gate.const_data_ptr();
  p.up = up.const_data_ptr();
  p.out = out.mutable_data_ptr();
  if (gate.is_cuda()) {
    check_aligned(gate, "gate");
    check_aligned(up, "up");
    ALITOK_DISPATCH_CUDA(swiglu_cuda, gate.get_device_index(), p);
  } else {
    ALITOK_DISPATCH_ISA(swiglu_cpu, p, torch_parallel());
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) { m.impl("swiglu", TORCH_BOX(&swiglu)); }
STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) { m.impl("swiglu", TORCH_BOX(&swiglu)); }

}  // namespace
}  // namespace alitok
