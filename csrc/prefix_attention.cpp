// prefix_attention: argument checks, allocation and dispatch. The only file of the operator that sees tensors.
#include "prefix_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cuda_stream.h"
#include "torch_parallel.h"

namespace alitok {
namespace {

using torch::stable::new_empty;
using OptionalTensor = std::optional<Tensor>;

AttentionDtype attention_dtype(const Tensor& qkv) {
  check_dtype(qkv, "qkv", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  switch (qkv.scalar_type()) {
    case ScalarType::Float: return AttentionDtype::float32;
    case ScalarType::BFloat16: return AttentionDtype::bfloat16;
    default: return AttentionDtype::float16;
  }
}

// A contiguous float32 argument on the device of qkv, or null when it was not given.
const float* float_data(const OptionalTensor& t, const char* name, const Tensor& qkv,
                        std::initializer_list<int64_t> shape) {
  if (!t.has_value()) return nullptr;
  check_dtype(*t, name, {ScalarType::Float});
  check_shape(*t, name, shape);
  check_contiguous(*t, name);
  return static_cast<const float*>(t->data_ptr());
}

// The kernels read rows at any stride, each row (3, H, D) dense; anything else is copied first.
Tensor with_dense_rows(const Tensor& qkv) {
  const int64_t heads = qkv.size(3), head_dim = qkv.size(4);
  const bool dense = qkv.stride(4) == 1 && qkv.stride(3) == head_dim && qkv.stride(2) == heads * head_dim;
  return dense ? qkv : torch::stable::contiguous(qkv);
}

// Checks everything but the outputs and fills in the parameters. `qkv` has dense rows and outlives the result.
PrefixAttentionParams make_params(const Tensor& qkv, int64_t prefix_len, const OptionalTensor& q_norm_weight,
                                  const OptionalTensor& k_norm_weight, double norm_eps, const OptionalTensor& rope,
                                  double scale, double dropout, const OptionalTensor& seed) {
  PrefixAttentionParams p{};
  p.dtype = attention_dtype(qkv);
  p.batch = qkv.size(0), p.length = qkv.size(1), p.heads = qkv.size(3), p.head_dim = qkv.size(4);
  p.qkv = qkv.data_ptr();
  p.qkv_batch_stride = qkv.stride(0), p.qkv_row_stride = qkv.stride(1);

  check_range(prefix_len, "prefix_len", 0, p.length);
  p.prefix_len = prefix_len;
  check(q_norm_weight.has_value() == k_norm_weight.has_value(), "k_norm_weight", "both norm weights or neither",
        q_norm_weight.has_value() ? "q_norm_weight alone" : "k_norm_weight alone");
  p.q_norm_weight = float_data(q_norm_weight, "q_norm_weight", qkv, {p.head_dim});
  p.k_norm_weight = float_data(k_norm_weight, "k_norm_weight", qkv, {p.head_dim});
  check(norm_eps >= 0, "norm_eps", "a number >= 0", norm_eps);
  p.norm_eps = static_cast<float>(norm_eps);
  p.rope = float_data(rope, "rope", qkv, {p.length, p.head_dim / 2, 2});
  check(std::isfinite(scale), "scale", "a finite number", scale);
  p.scale = static_cast<float>(scale);

  p.dropout = check_dropout(dropout, seed);
  return p;
}

void check_qkv(const Tensor& qkv) {
  attention_dtype(qkv);
  check_dim(qkv, "qkv", 5);
  check_size(qkv, "qkv", 2, 3);
  check(qkv.size(1) >= 1 && qkv.size(3) >= 1, "qkv", "(B, L, 3, H, D) with L >= 1 and H >= 1",
        "shape " + shape_name(qkv));
  const int64_t head_dim = qkv.size(4);
  check(head_dim >= 8 && head_dim <= 128 && head_dim % 8 == 0, "qkv",
        "a head dimension (last) that is a multiple of 8 in 8..128", head_dim);
  // Heads go along a side of the CUDA grid, and dropout numbers them with 32 bits.
  check(qkv.size(1) <= kPrefixAttentionMostLength && qkv.size(0) * qkv.size(3) < int64_t{1} << 31, "qkv",
        "L at most " + std::to_string(kPrefixAttentionMostLength) + " and B * H below 2**31",
        "shape " + shape_name(qkv));
  check(qkv.is_cpu() || qkv.is_cuda(), "qkv", "a tensor on cpu or cuda", device_name(qkv));
}

// Bytes of working memory; null and no allocation for none.
void* allocate(OptionalTensor& holder, const Tensor& like, int64_t bytes) {
  if (bytes == 0) return nullptr;
  holder = new_empty(like, {bytes}, ScalarType::Byte);
  return holder->data_ptr();
}

std::tuple<Tensor, Tensor> prefix_attention(const Tensor& qkv_in, int64_t prefix_len,
                                            const OptionalTensor& q_norm_weight, const OptionalTensor& k_norm_weight,
                                            double norm_eps, const OptionalTensor& rope, double scale, double dropout,
                                            const OptionalTensor& seed) {
  check_tensors({{"qkv", qkv_in},
                 {"q_norm_weight", q_norm_weight},
                 {"k_norm_weight", k_norm_weight},
                 {"rope", rope},
                 {"seed", seed}});
  check_qkv(qkv_in);
  const Tensor qkv = with_dense_rows(qkv_in);
  PrefixAttentionParams p =
      make_params(qkv, prefix_len, q_norm_weight, k_norm_weight, norm_eps, rope, scale, dropout, seed);
  Tensor out = new_empty(qkv, {p.batch, p.length, p.heads, p.head_dim});
  Tensor lse = new_empty(qkv, {p.batch, p.heads, p.length}, ScalarType::Float);
  if (p.batch == 0) return {out, lse};
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());

  if (qkv.is_cuda()) {
#ifdef ALITOK_CUDA
    OptionalTensor workspace;
    p.workspace = allocate(workspace, qkv, prefix_attention_workspace_cuda(p));
#endif
    ALITOK_DISPATCH_CUDA(prefix_attention_cuda, qkv.get_device_index(), p);
  } else {
    const Parallel parallel = torch_parallel();
    ALITOK_DISPATCH_ISA(prefix_attention_cpu, p, parallel);
  }
  return {out, lse};
}

// The gradients of qkv and of the norm weights; those are float32, and empty where there are no weights.
std::tuple<Tensor, Tensor, Tensor> prefix_attention_backward(const Tensor& grad_out_in, const Tensor& qkv_in,
                                                             const Tensor& out, const Tensor& lse, int64_t prefix_len,
                                                             const OptionalTensor& q_norm_weight,
                                                             const OptionalTensor& k_norm_weight, double norm_eps,
                                                             const OptionalTensor& rope, double scale, double dropout,
                                                             const OptionalTensor& seed) {
  check_tensors({{"qkv", qkv_in},
                 {"grad_out", grad_out_in},
                 {"out", out},
                 {"lse", lse},
                 {"q_norm_weight", q_norm_weight},
                 {"k_norm_weight", k_norm_weight},
                 {"rope", rope},
                 {"seed", seed}});
  check_qkv(qkv_in);
  const Tensor qkv = with_dense_rows(qkv_in);
  PrefixAttentionParams p =
      make_params(qkv, prefix_len, q_norm_weight, k_norm_weight, norm_eps, rope, scale, dropout, seed);
  const std::initializer_list<int64_t> out_shape = {p.batch, p.length, p.heads, p.head_dim};
  for (const auto& [t, name] : {std::pair{&grad_out_in, "grad_out"}, std::pair{&out, "out"}}) {
    check_dtype(*t, name, {qkv.scalar_type()});
    check_shape(*t, name, out_shape);
  }
  check_contiguous(out, "out");
  check_dtype(lse, "lse", {ScalarType::Float});
  check_shape(lse, "lse", {p.batch, p.heads, p.length});
  check_contiguous(lse, "lse");
  const Tensor grad_out = torch::stable::contiguous(grad_out_in);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());

  const int64_t weights = p.q_norm_weight == nullptr ? 0 : p.head_dim;
  Tensor grad_qkv = new_empty(qkv, {p.batch, p.length, 3, p.heads, p.head_dim});
  Tensor grad_q_weight = torch::stable::new_zeros(qkv, {weights}, ScalarType::Float);
  Tensor grad_k_weight = torch::stable::new_zeros(qkv, {weights}, ScalarType::Float);
  if (p.batch == 0) return {grad_qkv, grad_q_weight, grad_k_weight};
  PrefixAttentionBackwardParams b{p, grad_out.data_ptr(), grad_qkv.data_ptr(), nullptr, nullptr};
  if (weights > 0) {
    b.grad_q_norm_weight = static_cast<float*>(grad_q_weight.data_ptr());
    b.grad_k_norm_weight = static_cast<float*>(grad_k_weight.data_ptr());
  }

  OptionalTensor workspace;
  if (qkv.is_cuda()) {
#ifdef ALITOK_CUDA
    b.forward.workspace = allocate(workspace, qkv, prefix_attention_backward_workspace_cuda(p));
#endif
    ALITOK_DISPATCH_CUDA(prefix_attention_backward_cuda, qkv.get_device_index(), b);
  } else {
    b.forward.workspace = allocate(workspace, qkv, prefix_attention_backward_workspace_cpu(p));
    const Parallel parallel = torch_parallel();
    ALITOK_DISPATCH_ISA(prefix_attention_backward_cpu, b, parallel);
  }
  return {grad_qkv, grad_q_weight, grad_k_weight};
}

}  // namespace
}  // namespace alitok

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&alitok::prefix_attention));
  m.impl("prefix_attention_backward", TORCH_BOX(&alitok::prefix_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) {
  m.impl("prefix_attention", TORCH_BOX(&alitok::prefix_attention));
  m.impl("prefix_attention_backward", TORCH_BOX(&alitok::prefix_attention_backward));
}
