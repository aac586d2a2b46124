// cached_attention: attention of one new position of each row over a static key/value cache, to which it is appended.
// RMSNorm of query and key and the rotary table are applied on the way.
// The definition is cached_attention_reference in alitok_fast/ops/cached_attention.py.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "parallel.h"

namespace alitok {

enum class CachedAttentionDtype : int { float32, bfloat16, float16, e4m3 };

struct CachedAttentionParams {
  CachedAttentionDtype dtype;        // of qkv, out and the norm weights; not e4m3
  CachedAttentionDtype cache_dtype;  // `dtype` or e4m3
  int64_t rows, heads, head_dim, capacity;  // rows * heads below 2^31, a CUDA block each

  const void* qkv;  // (rows, 3, heads, head_dim) contiguous
  // Element (r, h, j, d) at r * row_stride + h * head_stride + j * head_dim + d; 16-byte aligned rows.
  void *keys, *values;
  int64_t row_stride, head_stride;
  const int64_t* position;  // one element: the index of the new position, in [0, capacity)

  const float* q_norm_weight;  // (head_dim), both or neither; used as rounded to `dtype`
  const float* k_norm_weight;
  float norm_eps;
  const float* rope;  // null, or (at least capacity, head_dim / 2, 2): cos, sin of each position
  float scale;

  void* out;  // (rows, heads, head_dim)
};

// A position outside [0, capacity) touches nothing and gives NaN: it is known on the device alone.
ALITOK_DECLARE_PER_ISA(void cached_attention_cpu(const CachedAttentionParams&, const Parallel&));

// The longest cache: CUDA keeps its scores in shared memory, and with them a block stays below the 99 KiB that every
// architecture from sm_80 on has.
constexpr int64_t kCachedAttentionMostPositions = 16384;

void cached_attention_cuda(const CachedAttentionParams&, void* stream);

}  // namespace alitok
