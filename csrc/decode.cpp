// decode: checks, allocation, dispatch.
#include "decode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "torch_parallel.h"

namespace alitok {
namespace {

WeightFormat weight_format(int64_t bytes) {
  switch (bytes) {
    case 4: return WeightFormat::float32;
    case 2: return WeightFormat::bfloat16;
    case 1: return WeightFormat::int8;
    default: fail("weight_bytes", "4, 2 or 1", bytes);
  }
}

void check_plain(const Tensor& t, const char* argument, std::initializer_list<ScalarType> dtypes, int64_t dim) {
  check_dtype(t, argument, dtypes);
  check_dim(t, argument, dim);
  check_contiguous(t, argument);
}

void check_ids(const Tensor& ids, int64_t vocabulary) {
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t r = 0; r < ids.numel(); ++r) check_range(id[r], "ids", 0, vocabulary - 1);
}

Tensor decode(const Tensor& arena, const Tensor& vectors, const Tensor& embeddings, const Tensor& rope,
              const Tensor& ids, Tensor keys, Tensor values, const Tensor& position, int64_t hidden,
              int64_t codes, int64_t bytes, double norm_eps) {
  check_plain(arena, "arena", {ScalarType::Byte}, 1);
  check_plain(vectors, "vectors", {ScalarType::Float}, 1);
  check_plain(embeddings, "embeddings", {ScalarType::Float}, 2);
  check_plain(rope, "rope", {ScalarType::Float}, 3);
  check_plain(ids, "ids", {ScalarType::Long}, 1);
  check_plain(position, "position", {ScalarType::Long}, 0);
  check_plain(keys, "keys", {ScalarType::Float, ScalarType::BFloat16}, 5);
  check_plain(values, "values", {keys.scalar_type()}, 5);
  for (int64_t axis = 0; axis < 5; ++axis) check_size(values, "values", axis, keys.size(axis));
  check_size(keys, "keys", 1, ids.size(0));
  check_range(hidden, "hidden", 1, 1 << 16);
  check_range(codes, "codes", 1, int64_t{1} << 30);

  DecodeParams p{};
  p.weights = weight_format(bytes);
  p.cache = keys.scalar_type() == ScalarType::Float ? CacheFormat::float32 : CacheFormat::bfloat16;
  p.layers = keys.size(0);
  p.rows = keys.size(1);
  p.heads = keys.size(2);
  p.capacity = keys.size(3);
  p.head_dim = keys.size(4);
  p.width = p.heads * p.head_dim;
  p.hidden = hidden;
  p.codes = codes;
  check(p.head_dim >= 2 && p.head_dim % 2 == 0, "keys", "an even head dimension", p.head_dim);
  check_range(p.width, "keys: heads * head_dim", 1, 1 << 16);
  check_size(embeddings, "embeddings", 1, p.width);
  p.position = *static_cast<const int64_t*>(position.const_data_ptr());
  check_range(p.position, "position", 0, p.capacity - 1);
  check(rope.size(0) > p.position && rope.size(1) == p.head_dim / 2 && rope.size(2) == 2, "rope",
        "shape (more than " + std::to_string(p.position) + ", " + std::to_string(p.head_dim / 2) + ", 2)",
        shape_name(rope));
  check_size(arena, "arena", 0, arena_size(p));
  check_size(vectors, "vectors", 0, vectors_size(p));
  check(reinterpret_cast<uintptr_t>(arena.const_data_ptr()) % 64 == 0, "arena", "data aligned to 64 bytes",
        "data that is not");
  check_ids(ids, embeddings.size(0));

  Tensor logits = torch::stable::new_empty(vectors, {p.rows, p.codes});
  if (p.rows == 0) return logits;
  p.norm_eps = static_cast<float>(norm_eps);
  p.arena = static_cast<const uint8_t*>(arena.const_data_ptr());
  p.vectors = static_cast<const float*>(vectors.const_data_ptr());
  p.embeddings = static_cast<const float*>(embeddings.const_data_ptr());
  p.rope = static_cast<const float*>(rope.const_data_ptr()) + p.position * p.head_dim;
  p.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  p.keys = keys.mutable_data_ptr();
  p.values = values.mutable_data_ptr();
  p.logits = static_cast<float*>(logits.mutable_data_ptr());
  ALITOK_DISPATCH_ISA(decode_cpu, p, torch_parallel());
  return logits;
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) { m.impl("decode", TORCH_BOX(&decode)); }

}  // namespace
}  // namespace alitok
