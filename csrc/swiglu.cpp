// swiglu: checks, allocation, dispatch.
#include "swiglu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

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

void check_like(const Tensor& t, const char* argument, const Tensor& gate) {
  check_dtype(t, argument, {gate.scalar_type()});
  check(shape_name(t) == shape_name(gate), argument, "shape " + shape_name(gate), shape_name(t));
  check_contiguous(t, argument);
  if (t.is_cuda()) check_aligned(t, argument);
}

SwigluParams make_params(const Tensor& gate, const Tensor& up) {
  check_dtype(gate, "gate", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_like(gate, "gate", gate);
  check_like(up, "up", gate);
  SwigluParams p{};
  p.dtype = gate.scalar_type() == ScalarType::Float      ? SwigluDtype::float32
            : gate.scalar_type() == ScalarType::BFloat16 ? SwigluDtype::bfloat16
                                                         : SwigluDtype::float16;
  p.size = gate.numel();
  p.gate = gate.const_data_ptr();
  p.up = up.const_data_ptr();
  return p;
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check_tensors({{"gate", gate}, {"up", up}});
  SwigluParams p = make_params(gate, up);
  Tensor out = torch::stable::empty_like(gate);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  if (gate.is_cuda()) {
    ALITOK_DISPATCH_CUDA(swiglu_cuda, gate.get_device_index(), p);
  } else {
    ALITOK_DISPATCH_ISA(swiglu_cpu, p, torch_parallel());
  }
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  check_tensors({{"gate", gate}, {"up", up}, {"grad", grad}});
  SwigluBackwardParams b{};
  b.forward = make_params(gate, up);
  check_like(grad, "grad", gate);
  Tensor grad_gate = torch::stable::empty_like(gate), grad_up = torch::stable::empty_like(gate);
  if (gate.numel() == 0) return {grad_gate, grad_up};
  b.grad = grad.const_data_ptr();
  b.grad_gate = grad_gate.mutable_data_ptr();
  b.grad_up = grad_up.mutable_data_ptr();
  if (gate.is_cuda()) {
    ALITOK_DISPATCH_CUDA(swiglu_backward_cuda, gate.get_device_index(), b);
  } else {
    ALITOK_DISPATCH_ISA(swiglu_backward_cpu, b, torch_parallel());
  }
  return {grad_gate, grad_up};
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}
STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace
}  // namespace alitok
