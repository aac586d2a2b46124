// decode: checks, allocation, dispatch.
#include "decode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "overlap.h"
#include "sample_settings.h"
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

// Positions lie on the CPU, as all that these operators read: rows that rest have -1.
void check_positions(const DecodeParams& p, int64_t last) {
  for (int64_t r = 0; r < p.rows; ++r) check_range(p.positions[r], "positions", -1, last);
}

// No two rows write to one sequence of the cache.
void check_slots(const DecodeParams& p) {
  std::vector<bool> taken(static_cast<size_t>(p.slots));
  for (int64_t r = 0; r < p.rows; ++r) {
    if (p.positions[r] < 0) continue;
    const int64_t slot = p.slot_of == nullptr ? r : p.slot_of[r];
    check_range(slot, "slots", 0, p.slots - 1);
    check(!taken[static_cast<size_t>(slot)], "slots", "another one for each row",
          "slot " + std::to_string(slot) + " twice");
    taken[static_cast<size_t>(slot)] = true;
  }
}

// The first `columns` ids of each row that does not rest.
void check_ids(const DecodeParams& p, int64_t columns, int64_t vocabulary) {
  for (int64_t r = 0; r < p.rows; ++r) {
    if (p.positions[r] < 0) continue;
    for (int64_t w = 0; w < columns; ++w) check_range(p.ids[r * p.columns + w], "ids", 0, vocabulary - 1);
  }
}

// What both operators share: everything but the logits and what ids and positions hold.
DecodeParams decode_params(const Tensor& arena, const Tensor& vectors, const Tensor& embeddings, const Tensor& rope,
                           const Tensor& ids, Tensor& keys, Tensor& values, const Tensor& positions,
                           const std::optional<Tensor>& slots, int64_t hidden, int64_t codes, int64_t bytes,
                           int64_t activation_bytes, double norm_eps) {
  check_plain(arena, "arena", {ScalarType::Byte}, 1);
  check_plain(vectors, "vectors", {ScalarType::Float}, 1);
  check_plain(embeddings, "embeddings", {ScalarType::Float}, 2);
  check_plain(rope, "rope", {ScalarType::Float}, 3);
  check_plain(ids, "ids", {ScalarType::Long}, 2);
  check_plain(positions, "positions", {ScalarType::Long}, 1);
  check_size(positions, "positions", 0, ids.size(0));
  check_plain(keys, "keys", {ScalarType::Float, ScalarType::BFloat16}, 5);
  check_plain(values, "values", {keys.scalar_type()}, 5);
  for (int64_t axis = 0; axis < 5; ++axis) check_size(values, "values", axis, keys.size(axis));
  if (slots) {
    check_plain(*slots, "slots", {ScalarType::Long}, 1);
    check_size(*slots, "slots", 0, ids.size(0));
  } else {
    check(keys.size(1) >= ids.size(0), "keys", "a sequence for each of the " + std::to_string(ids.size(0)) + " rows",
          "shape " + shape_name(keys));
  }
  check_range(hidden, "hidden", 1, 1 << 16);
  check_range(codes, "codes", 1, int64_t{1} << 30);

  DecodeParams p{};
  p.weights = weight_format(bytes);
  const int64_t own_bytes = p.weights == WeightFormat::int8 ? 2 : bytes;
  check(activation_bytes == own_bytes || (bytes == 1 && activation_bytes == 1), "activation_bytes",
        bytes == 1 ? "2 or 1" : std::to_string(own_bytes), activation_bytes);
  p.narrow = activation_bytes == 1;
  p.cache = keys.scalar_type() == ScalarType::Float ? CacheFormat::float32 : CacheFormat::bfloat16;
  check(keys.size(0) <= 1 << 16, "keys", "at most 2^16 layers", "shape " + shape_name(keys));
  p.layers = keys.size(0);
  p.slots = keys.size(1);
  p.heads = keys.size(2);
  p.capacity = keys.size(3);
  p.head_dim = keys.size(4);
  p.width = p.heads * p.head_dim;
  p.hidden = hidden;
  p.codes = codes;
  p.rows = ids.size(0);
  p.columns = ids.size(1);
  check(p.columns >= 1, "ids", "a column or more", "shape " + shape_name(ids));
  check(p.head_dim >= 2 && p.head_dim % 2 == 0, "keys", "an even head dimension", p.head_dim);
  check_range(p.width, "keys: heads * head_dim", 1, 1 << 16);
  check_size(embeddings, "embeddings", 1, p.width);
  check(rope.size(0) >= p.capacity && rope.size(1) == p.head_dim / 2 && rope.size(2) == 2, "rope",
        "shape (" + std::to_string(p.capacity) + " or more, " + std::to_string(p.head_dim / 2) + ", 2)",
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
  p.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  p.slot_of = slots ? static_cast<const int64_t*>(slots->const_data_ptr()) : nullptr;
  p.keys = keys.mutable_data_ptr();
  p.values = values.mutable_data_ptr();
  return p;
}

Tensor decode(const Tensor& arena, const Tensor& vectors, const Tensor& embeddings, const Tensor& rope,
              const Tensor& ids, Tensor keys, Tensor values, const Tensor& positions,
              const std::optional<Tensor>& slots, int64_t hidden, int64_t codes, int64_t bytes,
              int64_t activation_bytes, double norm_eps) {
  check_tensors({{"arena", arena},
                 {"vectors", vectors},
                 {"embeddings", embeddings},
                 {"rope", rope},
                 {"ids", ids},
                 {"keys", keys},
                 {"values", values},
                 {"positions", positions},
                 {"slots", slots}});
  DecodeParams p = decode_params(arena, vectors, embeddings, rope, ids, keys, values, positions, slots, hidden, codes,
                                 bytes, activation_bytes, norm_eps);
  check(p.capacity >= p.columns, "keys", "a capacity of " + std::to_string(p.columns) + " or more", p.capacity);
  check_positions(p, p.capacity - p.columns);
  check_slots(p);
  check_ids(p, p.columns, embeddings.size(0));
  check_no_overlap({{"keys", keys}, {"values", values}}, {{"arena", arena},
                                                          {"vectors", vectors},
                                                          {"embeddings", embeddings},
                                                          {"rope", rope},
                                                          {"ids", ids},
                                                          {"positions", positions},
                                                          {"slots", slots}});
  Tensor logits = torch::stable::new_empty(vectors, {p.rows, p.columns, p.codes});
  if (p.rows == 0) return logits;
  p.logits = static_cast<float*>(logits.mutable_data_ptr());
  const int64_t row_size = p.columns * p.codes;
  for (int64_t r = 0; r < p.rows; ++r) {
    if (p.positions[r] < 0) std::fill_n(p.logits + r * row_size, row_size, std::numeric_limits<float>::quiet_NaN());
  }
  ALITOK_DISPATCH_ISA(decode_cpu, p, process_crew(), torch_parallel());
  return logits;
}

void decode_tokens(const Tensor& arena, const Tensor& vectors, const Tensor& embeddings, const Tensor& rope, Tensor ids,
                   Tensor keys, Tensor values, Tensor positions, const std::optional<Tensor>& slots, Tensor tokens,
                   const Tensor& prompt_lengths, const std::optional<Tensor>& schedule, const Tensor& temperature,
                   const Tensor& top_k, const Tensor& top_p, const Tensor& seeds, const Tensor& image_ids,
                   Tensor passes_done, int64_t passes, int64_t window, int64_t hidden, int64_t codes, int64_t bytes,
                   int64_t activation_bytes, double norm_eps) {
  check_tensors({{"arena", arena},
                 {"vectors", vectors},
                 {"embeddings", embeddings},
                 {"rope", rope},
                 {"ids", ids},
                 {"keys", keys},
                 {"values", values},
                 {"positions", positions},
                 {"slots", slots},
                 {"tokens", tokens},
                 {"prompt_lengths", prompt_lengths},
                 {"schedule", schedule},
                 {"temperature", temperature},
                 {"top_k", top_k},
                 {"top_p", top_p},
                 {"seeds", seeds},
                 {"image_ids", image_ids},
                 {"passes_done", passes_done}});
  DecodeParams p = decode_params(arena, vectors, embeddings, rope, ids, keys, values, positions, slots, hidden, codes,
                                 bytes, activation_bytes, norm_eps);
  check_range(passes, "passes", 1, int64_t{1} << 30);
  check_range(window, "window", 1, p.columns);
  check(codes <= embeddings.size(0), "codes", "at most the rows of embeddings, " + std::to_string(embeddings.size(0)),
        codes);
  DrawParams draw{};
  draw.passes = passes;
  draw.window = window;
  check_plain(tokens, "tokens", {ScalarType::Long}, 2);
  draw.batch = tokens.size(0);
  draw.length = tokens.size(1);
  check_range(draw.length, "tokens: size along dimension 1", 1, p.capacity);
  check_size(ids, "ids", 0, schedule ? 2 * draw.batch : draw.batch);
  if (schedule) {
    check_plain(*schedule, "schedule", {ScalarType::Float}, 2);
    check_shape(*schedule, "schedule", {draw.batch, draw.length});
    draw.guidance = static_cast<const float*>(schedule->const_data_ptr());
  }
  draw.settings = sample_settings(temperature, top_k, top_p, seeds, image_ids, draw.batch);
  check_plain(prompt_lengths, "prompt_lengths", {ScalarType::Long}, 1);
  check_size(prompt_lengths, "prompt_lengths", 0, draw.batch);
  check_plain(passes_done, "passes_done", {ScalarType::Long}, 1);
  check_size(passes_done, "passes_done", 0, draw.batch);
  draw.prompt_lengths = static_cast<const int64_t*>(prompt_lengths.const_data_ptr());
  check_no_overlap({{"ids", ids},
                    {"keys", keys},
                    {"values", values},
                    {"positions", positions},
                    {"tokens", tokens},
                    {"passes_done", passes_done}},
                   {{"arena", arena},
                    {"vectors", vectors},
                    {"embeddings", embeddings},
                    {"rope", rope},
                    {"slots", slots},
                    {"prompt_lengths", prompt_lengths},
                    {"schedule", schedule},
                    {"temperature", temperature},
                    {"top_k", top_k},
                    {"top_p", top_p},
                    {"seeds", seeds},
                    {"image_ids", image_ids}});
  draw.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  draw.passes_done = static_cast<int64_t*>(passes_done.mutable_data_ptr());
  draw.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  draw.positions = static_cast<int64_t*>(positions.mutable_data_ptr());
  check_positions(p, draw.length - 1);
  check_slots(p);
  check_ids(p, window, embeddings.size(0));
  for (int64_t b = 0; b < draw.batch; ++b) {
    const int64_t position = p.positions[b], other = schedule ? p.positions[b + draw.batch] : -1;
    const int64_t given = std::min(draw.prompt_lengths[b], draw.length);
    if (other >= 0)  // a call may end between the rows of a prompt
      check(other == position || (position >= 0 && std::max(position, other) <= given), "positions",
            "the same for both rows of an image behind its prompt",
            std::to_string(position) + " and " + std::to_string(other));
    if (position < 0) continue;
    for (int64_t i = other < 0 ? position : std::min(position, other); i < given; ++i)
      check_range(draw.tokens[b * draw.length + i], "tokens: the prompt", 0, codes - 1);
  }
  if (p.rows > 0) ALITOK_DISPATCH_ISA(decode_tokens_cpu, p, draw, process_crew(), torch_parallel());
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("decode_tokens", TORCH_BOX(&decode_tokens));
}

}  // namespace
}  // namespace alitok
