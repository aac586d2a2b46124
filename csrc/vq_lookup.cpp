// vq_lookup: checks, allocation, dispatch.
#include "vq_lookup.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "checks.h"
#include "cuda_stream.h"
#include "torch_parallel.h"

namespace alitok {
namespace {

constexpr int64_t kMostRows = (int64_t{1} << 31) - 1;  // indices are 32 bits inside the kernels

void check_inputs(const Tensor& z, const Tensor& codebook, double commitment) {
  check_dtype(z, "z", {ScalarType::Float});
  check_dtype(codebook, "codebook", {ScalarType::Float});
  check_dim(z, "z", 2);
  check_dim(codebook, "codebook", 2);
  check(z.size(0) <= kMostRows, "z", "less than 2^31 features", "shape " + shape_name(z));
  check(z.size(1) >= 1, "z", "at least one channel", "shape " + shape_name(z));
  check(codebook.size(0) >= 1 && codebook.size(0) <= kMostRows, "codebook", "1 to 2^31 - 1 codes",
        "shape " + shape_name(codebook));
  check_size(codebook, "codebook", 1, z.size(1));
  check(z.size(1) <= kVqLookupMostChannels, "z", "at most " + std::to_string(kVqLookupMostChannels) + " channels",
        "shape " + shape_name(z));
  check(std::isfinite(commitment), "commitment", "a finite number", commitment);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vq_lookup(const Tensor& z_any, const Tensor& codebook_any,
                                                             double commitment, bool with_closest) {
  check_tensors({{"z", z_any}, {"codebook", codebook_any}});
  check_inputs(z_any, codebook_any, commitment);
  const Tensor z = torch::stable::contiguous(z_any), codebook = torch::stable::contiguous(codebook_any);
  const int64_t features = z.size(0), codes = codebook.size(0);
  const Tensor quantized = torch::stable::empty_like(z);
  const Tensor indices = torch::stable::new_empty(z, {features}, ScalarType::Long);
  const Tensor loss = torch::stable::new_empty(z, {}, ScalarType::Float);
  const Tensor usage = torch::stable::new_empty(z, {codes}, ScalarType::Long);
  const Tensor closest = torch::stable::new_empty(z, {with_closest ? codes : 0}, ScalarType::Long);

  VqLookupParams p{};
  p.features = features;
  p.codes = codes;
  p.channels = z.size(1);
  p.commitment = static_cast<float>(commitment);
  p.z = z.const_data_ptr<float>();
  p.codebook = codebook.const_data_ptr<float>();
  p.quantized = quantized.mutable_data_ptr<float>();
  p.indices = indices.mutable_data_ptr<int64_t>();
  p.loss = loss.mutable_data_ptr<float>();
  p.usage = usage.mutable_data_ptr<int64_t>();
  p.closest = with_closest ? closest.mutable_data_ptr<int64_t>() : nullptr;
  if (z.is_cuda()) {
    const Tensor workspace = torch::stable::new_empty(z, {vq_lookup_workspace_cuda(p)}, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    ALITOK_DISPATCH_CUDA(vq_lookup_cuda, z.get_device_index(), p);
  } else {
    ALITOK_DISPATCH_ISA(vq_lookup_cpu, p, torch_parallel());
  }
  return {quantized, indices, loss, usage, closest};
}

std::tuple<Tensor, Tensor> vq_lookup_backward(const Tensor& grad_quantized_any, const Tensor& grad_loss,
                                              const Tensor& z_any, const Tensor& codebook_any,
                                              const Tensor& indices_any, double commitment) {
  check_tensors({{"z", z_any},
                 {"codebook", codebook_any},
                 {"grad_quantized", grad_quantized_any},
                 {"grad_loss", grad_loss},
                 {"indices", indices_any}});
  check_inputs(z_any, codebook_any, commitment);
  check_dtype(grad_quantized_any, "grad_quantized", {ScalarType::Float});
  check_shape(grad_quantized_any, "grad_quantized", {z_any.size(0), z_any.size(1)});
  check_dtype(grad_loss, "grad_loss", {ScalarType::Float});
  check_shape(grad_loss, "grad_loss", {});
  check_dtype(indices_any, "indices", {ScalarType::Long});
  check_shape(indices_any, "indices", {z_any.size(0)});
  const Tensor z = torch::stable::contiguous(z_any), codebook = torch::stable::contiguous(codebook_any);
  const Tensor grad_quantized = torch::stable::contiguous(grad_quantized_any);
  const Tensor indices = torch::stable::contiguous(indices_any);
  const Tensor grad_z = torch::stable::empty_like(z), grad_codebook = torch::stable::empty_like(codebook);

  VqLookupBackwardParams p{};
  p.features = z.size(0);
  p.codes = codebook.size(0);
  p.channels = z.size(1);
  p.commitment = static_cast<float>(commitment);
  p.grad_quantized = grad_quantized.const_data_ptr<float>();
  p.grad_loss = grad_loss.const_data_ptr<float>();
  p.z = z.const_data_ptr<float>();
  p.codebook = codebook.const_data_ptr<float>();
  p.indices = indices.const_data_ptr<int64_t>();
  p.grad_z = grad_z.mutable_data_ptr<float>();
  p.grad_codebook = grad_codebook.mutable_data_ptr<float>();
  if (z.is_cuda()) {
    ALITOK_DISPATCH_CUDA(vq_lookup_backward_cuda, z.get_device_index(), p);
  } else {
    // On CUDA this would stop the stream: there the kernel takes care.
    for (int64_t n = 0; n < p.features; ++n) check_range(p.indices[n], "indices", 0, p.codes - 1);
    ALITOK_DISPATCH_ISA(vq_lookup_backward_cpu, p, torch_parallel());
  }
  return {grad_z, grad_codebook};
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) {
  m.impl("vq_lookup", TORCH_BOX(&vq_lookup));
  m.impl("vq_lookup_backward", TORCH_BOX(&vq_lookup_backward));
}
STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) {
  m.impl("vq_lookup", TORCH_BOX(&vq_lookup));
  m.impl("vq_lookup_backward", TORCH_BOX(&vq_lookup_backward));
}

}  // namespace
}  // namespace alitok
