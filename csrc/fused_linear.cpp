// fused_linear: checks, allocation, dispatch. CUDA only: elsewhere alitok_fast/ops/fused_linear.py uses other operators.
#include "fused_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "cuda_stream.h"
#include "overlap.h"

namespace alitok {
namespace {

FusedLinearDtype fused_linear_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return FusedLinearDtype::bfloat16;
    case ScalarType::Half: return FusedLinearDtype::float16;
    case ScalarType::Char: return FusedLinearDtype::int8;
    case ScalarType::Float8_e4m3fn: return FusedLinearDtype::e4m3;
    default: return FusedLinearDtype::float32;
  }
}

void check_aligned(const Tensor& x, const char* name) {
  check(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, name, "memory aligned to 16 bytes",
        "a view that is not");
}

void check_matrix(const Tensor& weight, const char* name, ScalarType dtype, int64_t outputs, int64_t inputs) {
  check_dtype(weight, name, {dtype});
  check_shape(weight, name, {outputs, inputs});
  check_contiguous(weight, name);
  check_aligned(weight, name);
}

const char* name_of_rows(const std::optional<Tensor>& ids) { return ids ? "table" : "x"; }

const void* check_scale(const std::optional<Tensor>& scale, const char* name, const Tensor& weight) {
  const bool eight_bits = weight.scalar_type() == ScalarType::Char || weight.scalar_type() == ScalarType::Float8_e4m3fn;
  check(scale.has_value() == eight_bits, name, "given exactly beside 8-bit weights",
        scale.has_value() ? "one beside 16-bit weights" : "none");
  if (!scale) return nullptr;
  check_dtype(*scale, name, {ScalarType::BFloat16});
  check_shape(*scale, name, {weight.size(0), weight.size(1) / kFusedLinearGroup});
  check_contiguous(*scale, name);
  return scale->const_data_ptr();
}

// What all of these operators have. `x` is the rows, or the table of which `ids` names them.
FusedLinearParams params(const Tensor& x, const std::optional<Tensor>& ids, ScalarType dtype, const Tensor& weight,
                         const std::optional<Tensor>& scale, const std::optional<Tensor>& bias, bool clusters) {
  const char* name = name_of_rows(ids);
  check_dim(x, name, 2);
  check_contiguous(x, name);
  const Tensor& counted = ids ? *ids : x;
  check(counted.size(0) <= kFusedLinearMostRows, ids ? "ids" : "x",
        "at most " + std::to_string(kFusedLinearMostRows) + " rows", "shape " + shape_name(counted));
  check(x.size(1) % kFusedLinearGroup == 0, name, "a multiple of 64 inputs", "shape " + shape_name(x));
  check_aligned(x, name);
  check_dim(weight, "weight", 2);
  if (dtype == ScalarType::BFloat16) {
    check_dtype(weight, "weight", {ScalarType::BFloat16, ScalarType::Char, ScalarType::Float8_e4m3fn});
  } else {
    check_dtype(weight, "weight", {dtype});
  }
  check(weight.size(0) < int64_t{1} << 31, "weight", "fewer than 2^31 outputs", "shape " + shape_name(weight));
  check_matrix(weight, "weight", weight.scalar_type(), weight.size(0), x.size(1));
  FusedLinearParams p{};
  p.dtype = fused_linear_dtype(dtype);
  p.weight_dtype = fused_linear_dtype(weight.scalar_type());
  p.rows = counted.size(0);
  p.inputs = x.size(1);
  p.outputs = weight.size(0);
  p.x = x.const_data_ptr();
  if (ids) {
    p.ids = static_cast<const int64_t*>(ids->const_data_ptr());
    p.vocabulary = x.size(0);
  }
  p.weight = weight.const_data_ptr();
  p.scale = check_scale(scale, "scale", weight);
  if (bias) {
    check_dtype(*bias, "bias", {dtype});
    check_shape(*bias, "bias", {weight.size(0)});
    check_contiguous(*bias, "bias");
    p.bias = bias->const_data_ptr();
  }
  if (clusters) {
    check(p.inputs <= kFusedLinearMostShared, name,
          "at most " + std::to_string(kFusedLinearMostShared) + " inputs for clusters", "shape " + shape_name(x));
    check(p.outputs % 8 == 0, "weight", "a multiple of 8 outputs for clusters", "shape " + shape_name(weight));
  }
  return p;
}

void run(const FusedLinearParams& p, int32_t device_index, bool clusters) {
  if (clusters) {
    ALITOK_DISPATCH_CUDA(fused_linear_sm90, device_index, p);
  } else {
    ALITOK_DISPATCH_CUDA(fused_linear_cuda, device_index, p);
  }
}

// The norm ahead of a layer.
void add_norm(FusedLinearParams& p, const Tensor& x, const std::optional<Tensor>& ids, const Tensor& norm_weight,
              double norm_eps) {
  const char* name = name_of_rows(ids);
  check_dtype(x, name, {ScalarType::Float});
  check(p.inputs <= kFusedLinearMostNormed, name,
        "at most " + std::to_string(kFusedLinearMostNormed) + " inputs with a norm", "shape " + shape_name(x));
  check_shape(norm_weight, "norm_weight", {p.inputs});
  check_contiguous(norm_weight, "norm_weight");
  check_aligned(norm_weight, "norm_weight");
  p.norm_weight = norm_weight.const_data_ptr();
  p.norm_eps = static_cast<float>(norm_eps);
}

Tensor fused_linear(const Tensor& x, const std::optional<Tensor>& norm_weight, double norm_eps, const Tensor& weight,
                    const std::optional<Tensor>& scale, const std::optional<Tensor>& gate,
                    const std::optional<Tensor>& gate_scale, const std::optional<Tensor>& bias, bool clusters) {
  check_tensors({{"x", x},
                 {"norm_weight", norm_weight},
                 {"weight", weight},
                 {"scale", scale},
                 {"gate", gate},
                 {"gate_scale", gate_scale},
                 {"bias", bias}});
  const Tensor& like = norm_weight ? *norm_weight : x;
  check_dtype(like, norm_weight ? "norm_weight" : "x", {ScalarType::BFloat16, ScalarType::Half});
  FusedLinearParams p = params(x, std::nullopt, like.scalar_type(), weight, scale, bias, clusters);
  if (norm_weight) add_norm(p, x, std::nullopt, *norm_weight, norm_eps);
  if (gate) {
    check(norm_weight.has_value(), "gate", "none where there is no norm", "one");
    check_matrix(*gate, "gate", weight.scalar_type(), p.outputs, p.inputs);
    p.gate = gate->const_data_ptr();
    p.gate_scale = check_scale(gate_scale, "gate_scale", *gate);
  }
  Tensor out = torch::stable::new_empty(like, {p.rows, p.outputs});
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  run(p, x.get_device_index(), clusters);
  return out;
}

std::tuple<Tensor, Tensor> fused_linear_embed(const Tensor& ids, const Tensor& table, const Tensor& norm_weight,
                                              double norm_eps, const Tensor& weight, const std::optional<Tensor>& scale,
                                              const std::optional<Tensor>& bias, bool clusters) {
  check_tensors({{"ids", ids},
                 {"table", table},
                 {"norm_weight", norm_weight},
                 {"weight", weight},
                 {"scale", scale},
                 {"bias", bias}});
  check_dtype(ids, "ids", {ScalarType::Long});
  check_dim(ids, "ids", 1);
  check_contiguous(ids, "ids");
  check_dtype(norm_weight, "norm_weight", {ScalarType::BFloat16, ScalarType::Half});
  FusedLinearParams p = params(table, ids, norm_weight.scalar_type(), weight, scale, bias, clusters);
  add_norm(p, table, ids, norm_weight, norm_eps);
  const Tensor stream = torch::stable::new_empty(table, {p.rows, p.inputs});
  const Tensor out = torch::stable::new_empty(norm_weight, {p.rows, p.outputs});
  p.stream = static_cast<float*>(stream.mutable_data_ptr());
  p.out = out.mutable_data_ptr();
  if (out.numel() > 0) run(p, ids.get_device_index(), clusters);
  return {stream, out};
}

void fused_linear_add(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& bias, const Tensor& residual, bool clusters) {
  check_tensors({{"x", x}, {"weight", weight}, {"scale", scale}, {"bias", bias}, {"residual", residual}});
  check_dtype(x, "x", {ScalarType::BFloat16, ScalarType::Half});
  FusedLinearParams p = params(x, std::nullopt, x.scalar_type(), weight, scale, bias, clusters);
  check_dtype(residual, "residual", {ScalarType::Float});
  check_shape(residual, "residual", {p.rows, p.outputs});
  check_contiguous(residual, "residual");
  if (clusters) check_aligned(residual, "residual");
  check_no_overlap({{"residual", residual}}, {{"x", x}, {"weight", weight}, {"scale", scale}, {"bias", bias}});
  if (residual.numel() == 0) return;
  p.residual = static_cast<float*>(residual.mutable_data_ptr());
  run(p, x.get_device_index(), clusters);
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) {
  m.impl("fused_linear", TORCH_BOX(&fused_linear));
  m.impl("fused_linear_embed", TORCH_BOX(&fused_linear_embed));
  m.impl("fused_linear_add", TORCH_BOX(&fused_linear_add));
}

}  // namespace
}  // namespace alitok
