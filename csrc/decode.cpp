// decode: checks, allocation, dispatch.
#include "decode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "checks.h"
#include "overlap.h"
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

void check_values(const int64_t* values, int64_t count, const char* argument, int64_t end) {
  for (int64_t i = 0; i < count; ++i) check_range(values[i], argument, 0, end - 1);
}

// What both operators share: everything but the logits.
DecodeParams decode_params(const Tensor& arena, const Tensor& vectors, const Tensor& embeddings, const Tensor& rope,
                           const Tensor& ids, Tensor& keys, Tensor& values, const Tensor& position, int64_t steps,
                           int64_t hidden, int64_t codes, int64_t bytes, double norm_eps) {
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
  check(keys.size(0) <= 1 << 16, "keys", "at most 2^16 layers", "shape " + shape_name(keys));
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
  check(p.capacity >= steps, "keys", "a capacity of " + std::to_string(steps) + " or more", p.capacity);
  check_range(p.position, "position", 0, p.capacity - steps);
  check(rope.size(0) >= p.position + steps && rope.size(1) == p.head_dim / 2 && rope.size(2) == 2, "rope",
        "shape (" + std::to_string(p.position + steps) + " or more, " + std::to_string(p.head_dim / 2) + ", 2)",
        shape_name(rope));
  check_size(arena, "arena", 0, arena_size(p));
  check_size(vectors, "vectors", 0, vectors_size(p));
  check(reinterpret_cast<uintptr_t>(arena.const_data_ptr()) % 64 == 0, "arena", "data aligned to 64 bytes",
        "data that is not");
  p.norm_eps = static_cast<float>(norm_eps);
  p.arena = static_cast<const uint8_t*>(arena.const_data_ptr());
  p.vectors = static_cast<const float*>(vectors.const_data_ptr());
  p.embeddings = static_cast<const float*>(embeddings.const_data_ptr());
  p.rope = static_cast<const float*>(rope.const_data_ptr());
  p.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  p.keys = keys.mutable_data_ptr();
  p.values = values.mutable_data_ptr();
  check_values(p.ids, p.rows, "ids", embeddings.size(0));
  return p;
}

Tensor decode(const Tensor& arena, const Tensor& vectors, const Tensor& embeddings, const Tensor& rope,
              const Tensor& ids, Tensor keys, Tensor values, const Tensor& position, int64_t hidden, int64_t codes,
              int64_t bytes, double norm_eps) {
  check_tensors({{"arena", arena},
                 {"vectors", vectors},
                 {"embeddings", embeddings},
                 {"rope", rope},
                 {"ids", ids},
                 {"keys", keys},
                 {"values", values},
                 {"position", position}});
  DecodeParams p =
      decode_params(arena, vectors, embeddings, rope, ids, keys, values, position, 1, hidden, codes, bytes, norm_eps);
  check_no_overlap({{"keys", keys}, {"values", values}}, {{"arena", arena},
                                                          {"vectors", vectors},
                                                          {"embeddings", embeddings},
                                                          {"rope", rope},
                                                          {"ids", ids},
                                                          {"position", position}});
  Tensor logits = torch::stable::new_empty(vectors, {p.rows, p.codes});
  if (p.rows == 0) return logits;
  p.logits = static_cast<float*>(logits.mutable_data_ptr());
  ALITOK_DISPATCH_ISA(decode_cpu, p, process_crew(), torch_parallel());
  return logits;
}

int64_t one_integer(const Tensor& t, const char* argument) {
  check_plain(t, argument, {ScalarType::Long}, 0);
  return *static_cast<const int64_t*>(t.const_data_ptr());
}

void decode_tokens(const Tensor& arena, const Tensor& vectors, const Tensor& embeddings, const Tensor& rope, Tensor ids,
                   Tensor keys, Tensor values, Tensor position, Tensor tokens, const Tensor& prompt_length,
                   const std::optional<Tensor>& schedule, double temperature, std::optional<int64_t> top_k,
                   std::optional<double> top_p, const Tensor& seed, const Tensor& image_ids, int64_t steps,
                   int64_t hidden, int64_t codes, int64_t bytes, double norm_eps) {
  check_tensors({{"arena", arena},
                 {"vectors", vectors},
                 {"embeddings", embeddings},
                 {"rope", rope},
                 {"ids", ids},
                 {"keys", keys},
                 {"values", values},
                 {"position", position},
                 {"tokens", tokens},
                 {"prompt_length", prompt_length},
                 {"schedule", schedule},
                 {"seed", seed},
                 {"image_ids", image_ids}});
  check_range(steps, "steps", 1, int64_t{1} << 30);
  DecodeParams p = decode_params(arena, vectors, embeddings, rope, ids, keys, values, position, steps, hidden, codes,
                                 bytes, norm_eps);
  check(codes <= embeddings.size(0), "codes", "at most the rows of embeddings, " + std::to_string(embeddings.size(0)),
        codes);
  const int64_t end = p.position + steps;
  DrawParams draw{};
  draw.steps = steps;
  check_plain(tokens, "tokens", {ScalarType::Long}, 2);
  draw.batch = tokens.size(0);
  check(tokens.size(1) >= end, "tokens", "size " + std::to_string(end) + " or more along dimension 1",
        "shape " + shape_name(tokens));
  check_size(ids, "ids", 0, schedule ? 2 * draw.batch : draw.batch);
  if (schedule) {
    check_plain(*schedule, "schedule", {ScalarType::Float}, 1);
    check(schedule->size(0) >= end, "schedule", "size " + std::to_string(end) + " or more",
          "shape " + shape_name(*schedule));
    draw.guidance = static_cast<const float*>(schedule->const_data_ptr());
  }
  draw.rule = sample_rule(temperature, top_k, top_p, codes);
  draw.seed = static_cast<uint64_t>(one_integer(seed, "seed"));
  check_plain(image_ids, "image_ids", {ScalarType::Long}, 1);
  check_size(image_ids, "image_ids", 0, draw.batch);
  draw.image_ids = static_cast<const int64_t*>(image_ids.const_data_ptr());
  draw.prompt_length = one_integer(prompt_length, "prompt_length");
  draw.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  draw.tokens_stride = tokens.size(1);
  draw.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  check_no_overlap({{"ids", ids}, {"keys", keys}, {"values", values}, {"position", position}, {"tokens", tokens}},
                   {{"arena", arena},
                    {"vectors", vectors},
                    {"embeddings", embeddings},
                    {"rope", rope},
                    {"prompt_length", prompt_length},
                    {"schedule", schedule},
                    {"seed", seed},
                    {"image_ids", image_ids}});
  const int64_t given = std::clamp(draw.prompt_length, p.position, end) - p.position;
  for (int64_t b = 0; b < draw.batch; ++b)
    check_values(draw.tokens + b * draw.tokens_stride + p.position, given, "tokens: the prompt", codes);

  if (p.rows > 0) {
    const Tensor logits = torch::stable::new_empty(vectors, {p.rows, p.codes});
    p.logits = static_cast<float*>(logits.mutable_data_ptr());
    ALITOK_DISPATCH_ISA(decode_tokens_cpu, p, draw, process_crew(), torch_parallel());
  }
  *static_cast<int64_t*>(position.mutable_data_ptr()) = end;
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("decode_tokens", TORCH_BOX(&decode_tokens));
}

}  // namespace
}  // namespace alitok
