// cached_attention: checks, allocation, dispatch.
#include "cached_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "cuda_stream.h"
#include "overlap.h"
#include "torch_parallel.h"

namespace alitok {
namespace {

CachedAttentionDtype cached_attention_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return CachedAttentionDtype::bfloat16;
    case ScalarType::Half: return CachedAttentionDtype::float16;
    case ScalarType::Float8_e4m3fn: return CachedAttentionDtype::e4m3;
    default: return CachedAttentionDtype::float32;
  }
}

void check_cache(const Tensor& cache, const char* argument, const Tensor& qkv) {
  check_dim(cache, argument, 4);
  check_dtype(cache, argument, {qkv.scalar_type(), ScalarType::Float8_e4m3fn});
  check_size(cache, argument, 1, qkv.size(3));
  check_size(cache, argument, 3, qkv.size(4));
  check(cache.stride(3) == 1 && cache.stride(2) == cache.size(3), argument, "dense last two dimensions",
        "strides that are not");
  const CachedAttentionDtype dtype = cached_attention_dtype(cache.scalar_type());
  const std::string bytes = std::to_string(cached_attention_access(dtype));
  check(!cache.is_cuda() || cached_attention_aligned(cache.const_data_ptr(), cache.stride(0), cache.stride(1), dtype),
        argument, "memory aligned to " + bytes + " bytes, strides that are multiples of " + bytes + " bytes",
        "a view that is not");
  check(cache.size(2) <= kCachedAttentionMostPositions, argument,
        "at most " + std::to_string(kCachedAttentionMostPositions) + " positions", "shape " + shape_name(cache));
}

const float* check_weight(const std::optional<Tensor>& weight, const char* argument, const Tensor& qkv) {
  if (!weight) return nullptr;
  check_dtype(*weight, argument, {ScalarType::Float});
  check_shape(*weight, argument, {qkv.size(4)});
  check_contiguous(*weight, argument);
  return static_cast<const float*>(weight->const_data_ptr());
}

int64_t multiprocessors_of(int32_t device_index) {
#ifdef ALITOK_CUDA
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  return cached_attention_multiprocessors();
#else
  (void)device_index;
  return 1;  // the launch is refused
#endif
}

Tensor cached_attention(const Tensor& qkv, Tensor keys, Tensor values, const Tensor& positions,
                        const std::optional<Tensor>& slots, const std::optional<Tensor>& q_norm_weight,
                        const std::optional<Tensor>& k_norm_weight, double norm_eps, const std::optional<Tensor>& rope,
                        double scale, std::optional<Tensor> arrivals) {
  check_tensors({{"qkv", qkv},
                 {"keys", keys},
                 {"values", values},
                 {"positions", positions},
                 {"slots", slots},
                 {"q_norm_weight", q_norm_weight},
                 {"k_norm_weight", k_norm_weight},
                 {"rope", rope},
                 {"arrivals", arrivals}});
  check_dtype(qkv, "qkv", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_dim(qkv, "qkv", 5);
  check_size(qkv, "qkv", 2, 3);
  const int64_t rows = qkv.size(0), columns = qkv.size(1), heads = qkv.size(3), head_dim = qkv.size(4);
  check(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= 128, "qkv",
        "a head dimension that is a multiple of 8 in 8..128", head_dim);
  check(rows * columns * heads < int64_t{1} << 31 && columns < 65536, "qkv", "R * W * H below 2^31, W below 2^16",
        "shape " + shape_name(qkv));
  check_contiguous(qkv, "qkv");
  check_cache(keys, "keys", qkv);
  check_cache(values, "values", qkv);
  check(keys.scalar_type() == values.scalar_type(), "values", "the dtype of keys", dtype_name(values.scalar_type()));
  for (int64_t axis = 0; axis < 4; ++axis) {
    check_size(values, "values", axis, keys.size(axis));
    check(keys.stride(axis) == values.stride(axis), "values", "the strides of keys", "others");
  }
  check_dtype(positions, "positions", {ScalarType::Long});
  check_shape(positions, "positions", {rows});
  check_contiguous(positions, "positions");
  if (slots) {
    check_dtype(*slots, "slots", {ScalarType::Long});
    check_shape(*slots, "slots", {rows});
    check_contiguous(*slots, "slots");
  } else {
    check(keys.size(0) >= rows, "keys", "a sequence for each of the " + std::to_string(rows) + " rows",
          "shape " + shape_name(keys));
  }
  check(q_norm_weight.has_value() == k_norm_weight.has_value(), "k_norm_weight", "given exactly when q_norm_weight is",
        "one of the two");
  if (rope) {
    check_dtype(*rope, "rope", {ScalarType::Float});
    check_dim(*rope, "rope", 3);
    check(rope->size(0) >= keys.size(2) && rope->size(1) == head_dim / 2 && rope->size(2) == 2, "rope",
          "shape (at least " + std::to_string(keys.size(2)) + ", " + std::to_string(head_dim / 2) + ", 2)",
          shape_name(*rope));
    check_contiguous(*rope, "rope");
  }
  if (arrivals) {
    check_dtype(*arrivals, "arrivals", {ScalarType::Int});
    check_shape(*arrivals, "arrivals", {rows * columns * heads});
    check_contiguous(*arrivals, "arrivals");
  }
  CachedAttentionParams p{};
  p.q_norm_weight = check_weight(q_norm_weight, "q_norm_weight", qkv);
  p.k_norm_weight = check_weight(k_norm_weight, "k_norm_weight", qkv);
  check_no_overlap({{"keys", keys}, {"values", values}, {"arrivals", arrivals}}, {{"qkv", qkv},
                                                                                  {"positions", positions},
                                                                                  {"slots", slots},
                                                                                  {"q_norm_weight", q_norm_weight},
                                                                                  {"k_norm_weight", k_norm_weight},
                                                                                  {"rope", rope}});

  Tensor out = torch::stable::new_empty(qkv, {rows, columns, heads, head_dim});
  if (out.numel() == 0) return out;
  p.dtype = cached_attention_dtype(qkv.scalar_type());
  p.cache_dtype = cached_attention_dtype(keys.scalar_type());
  p.rows = rows;
  p.columns = columns;
  p.heads = heads;
  p.head_dim = head_dim;
  p.slots = keys.size(0);
  p.capacity = keys.size(2);
  p.qkv = qkv.const_data_ptr();
  p.keys = keys.mutable_data_ptr();
  p.values = values.mutable_data_ptr();
  p.slot_stride = keys.stride(0);
  p.head_stride = keys.stride(1);
  p.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  p.slot_of = slots ? static_cast<const int64_t*>(slots->const_data_ptr()) : nullptr;
  p.norm_eps = static_cast<float>(norm_eps);
  p.rope = rope ? static_cast<const float*>(rope->const_data_ptr()) : nullptr;
  p.scale = static_cast<float>(scale);
  p.out = out.mutable_data_ptr();
  if (qkv.is_cuda()) {
    const int64_t multiprocessors = multiprocessors_of(qkv.get_device_index());
    p.splits = arrivals ? cached_attention_splits(rows * columns * heads, p.capacity, multiprocessors) : 1;
    p.arrivals = arrivals ? static_cast<unsigned*>(arrivals->mutable_data_ptr()) : nullptr;
    const Tensor workspace = torch::stable::new_empty(qkv, {cached_attention_workspace(p)}, ScalarType::Float);
    p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    ALITOK_DISPATCH_CUDA(cached_attention_cuda, qkv.get_device_index(), p);
  } else {
    ALITOK_DISPATCH_ISA(cached_attention_cpu, p, torch_parallel());
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) { m.impl("cached_attention", TORCH_BOX(&cached_attention)); }
STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) { m.impl("cached_attention", TORCH_BOX(&cached_attention)); }

}  // namespace
}  // namespace alitok
