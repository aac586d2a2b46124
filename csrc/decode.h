// decode: one cached pass of the generator over consecutive inputs of each row, which has a position of its own.
// decode_tokens: several of them, each with its draws, within one call.
// The definitions are decode_reference and decode_tokens_reference in alitok_fast/ops/decode.py.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "parallel.h"
#include "sample_tokens.h"
#include "threads.h"

namespace alitok {

enum class WeightFormat : int { float32, bfloat16, int8 };
enum class CacheFormat : int { float32, bfloat16 };

// Every matrix (outputs, inputs) lies in the arena as panels of kPanelOutputs outputs, one after the other, in the order
// in which a step reads them: for each layer qkv, proj, w1 with w3 (16 + 16 outputs in each panel), w2; then the head.
// A panel holds (depth / g, kPanelOutputs, g) weights with g = 4 / sizeof(weight), so that four bytes of each output lie
// together; depth is `inputs` rounded up to kDepthMultiple with zeros. In a panel of int8 the weights of each
// kGroupInputs inputs are followed by a bfloat16 scale for each output, and the whole by a float for each output: 32768
// times the sum of its scaled weights. The head of an int8 generator is bfloat16.
constexpr int64_t kPanelOutputs = 32;
constexpr int64_t kDepthMultiple = 64;
constexpr int64_t kGroupInputs = kDepthMultiple;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t weight_bytes(WeightFormat format) {
  return format == WeightFormat::float32 ? 4 : format == WeightFormat::bfloat16 ? 2 : 1;
}
constexpr int64_t panel_bytes(WeightFormat format, int64_t inputs) {
  const int64_t depth = round_up(inputs, kDepthMultiple);
  const int64_t extra = format == WeightFormat::int8 ? depth / kGroupInputs * 2 + 4 : 0;
  return kPanelOutputs * (depth * weight_bytes(format) + extra);
}
constexpr int64_t panels(int64_t outputs) { return round_up(outputs, kPanelOutputs) / kPanelOutputs; }

struct DecodeParams {
  WeightFormat weights;
  bool narrow;  // int8 weights only: activations have 8 bits, and a scale for each group of inputs, instead of 16
  CacheFormat cache;
  int64_t layers, width, heads, head_dim, hidden, codes;
  int64_t slots, capacity;  // of the cache: sequences, and positions of each
  int64_t rows, columns;    // rows and, of each, consecutive inputs

  const uint8_t* arena;  // aligned to 64 bytes
  // float32: for each layer norm1 (width), qkv bias (3 width), q norm (head_dim), k norm (head_dim), proj bias (width),
  // norm2 (width); then the last norm (width) and the head's bias (codes).
  const float* vectors;
  const float* embeddings;  // (vocabulary, width)
  const float* rope;        // (positions, head_dim / 2, 2): cos, sin
  float norm_eps;

  const int64_t* ids;        // (rows, columns), in [0, vocabulary) in rows that do not rest
  const int64_t* positions;  // (rows): where the first input of a row stands; -1: it rests
  const int64_t* slot_of;    // (rows): its sequence in the cache, another for each; null: its own number
  void *keys, *values;       // (layers, slots, heads, capacity, head_dim); keys normalised and rotated
  float* logits;             // (rows, columns, codes); those of rows that rest stay
};

// What follows a pass: the draws, and what the next one is fed. Of row r, r % batch is the image.
struct DrawParams {
  int64_t passes, batch;          // rows = batch, or 2 batch with guidance: conditional, then unconditional ones
  int64_t window;                 // inputs of each row, at most `columns`: the first is certain, the others are guesses
  int64_t length;                 // tokens of an image; DecodeParams::capacity is as much or more
  const float* guidance;          // (batch, length): scale at each position; null: no guidance
  SampleSettings settings;        // of each image
  const int64_t* prompt_lengths;  // (batch): tokens before this position are given
  int64_t* tokens;                // (batch, length)
  int64_t* passes_done;           // (batch): counts those in which the image did not rest
  int64_t *ids, *positions;       // those of DecodeParams, which the next pass reads; an image that is done rests
};

// The inputs of one pass that only reads a prompt.
constexpr int64_t kPrefillInputs = 256;

constexpr WeightFormat head_format(WeightFormat weights) {
  return weights == WeightFormat::int8 ? WeightFormat::bfloat16 : weights;
}
constexpr int64_t layer_vectors(const DecodeParams& p) { return 6 * p.width + 2 * p.head_dim; }
constexpr int64_t vectors_size(const DecodeParams& p) { return p.layers * layer_vectors(p) + p.width + p.codes; }

// The matrices of one layer as offsets into its part of the arena.
struct LayerArena {
  int64_t qkv, proj, gate, down, bytes;
};
constexpr LayerArena layer_arena(const DecodeParams& p) {
  const int64_t wide = panel_bytes(p.weights, p.width), tall = panel_bytes(p.weights, p.hidden);
  const int64_t proj = panels(3 * p.width) * wide, gate = proj + panels(p.width) * wide;
  const int64_t down = gate + panels(2 * round_up(p.hidden, kPanelOutputs / 2)) * wide;
  return {0, proj, gate, down, down + panels(p.width) * tall};
}
constexpr int64_t arena_size(const DecodeParams& p) {
  return p.layers * layer_arena(p).bytes + panels(p.codes) * panel_bytes(head_format(p.weights), p.width);
}

// The logits at a position depend neither on the other inputs of the pass, of any row, nor on the slot, nor on the number
// of threads, to the last bit.
// `crew` says when one thread is faster than all.
ALITOK_DECLARE_PER_ISA(void decode_cpu(const DecodeParams&, Crew& crew, const Parallel&));
ALITOK_DECLARE_PER_ISA(void decode_tokens_cpu(const DecodeParams&, const DrawParams&, Crew& crew, const Parallel&));

}  // namespace alitok
