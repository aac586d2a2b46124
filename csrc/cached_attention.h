// cached_attention: attention of one or more new positions of each row, which has a position of its own, over a static
// key/value cache, to which they are appended.
// RMSNorm of query and key and the rotary table are applied on the way.
// The definition is cached_attention_reference in alitok_fast/ops/cached_attention.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_isa.h"
#include "parallel.h"

namespace alitok {

enum class CachedAttentionDtype : int { float32, bfloat16, float16, e4m3 };

struct CachedAttentionParams {
  CachedAttentionDtype dtype;              // of qkv, out and the norm weights; not e4m3
  CachedAttentionDtype cache_dtype;        // `dtype` or e4m3
  int64_t rows, columns, heads, head_dim;  // rows * columns * heads below 2^31, one CUDA block or more each
  int64_t slots, capacity;                 // of the cache: sequences, and positions of each

  const void* qkv;  // (rows, columns, 3, heads, head_dim) contiguous
  // Element (s, h, j, d) at s * slot_stride + h * head_stride + j * head_dim + d; for CUDA cached_attention_aligned().
  void *keys, *values;
  int64_t slot_stride, head_stride;
  const int64_t* positions;  // (rows): where the first new position of a row is, in [0, capacity)
  const int64_t* slot_of;    // (rows): its sequence in the cache, another for each; null: its own number

  const float* q_norm_weight;  // (head_dim), both or neither; used as rounded to `dtype`
  const float* k_norm_weight;
  float norm_eps;
  const float* rope;  // null, or (at least capacity, head_dim / 2, 2): cos, sin of each position
  float scale;

  void* out;  // (rows, columns, heads, head_dim)

  // CUDA: blocks that share the keys of a row, column and head, as many as cached_attention_splits() says, or 1.
  int64_t splits;
  float* workspace;    // as many as cached_attention_workspace() says
  unsigned* arrivals;  // (rows * columns * heads) zeros, and zeros again when the kernel has ended; unless splits is 1
};

// A position outside [0, capacity) touches nothing and gives NaN, as does a slot outside [0, slots): they are known on the
// device alone. So does a column that lies behind the last position.
ALITOK_DECLARE_PER_ISA(void cached_attention_cpu(const CachedAttentionParams&, const Parallel&));

// Bytes of a cache that CUDA moves at once: eight elements, in accesses of up to 16 bytes.
inline int64_t cached_attention_access(CachedAttentionDtype cache_dtype) {
  return cache_dtype == CachedAttentionDtype::e4m3 ? 8 : 16;
}
// Whether each of them may begin where it does. A view may begin anywhere and stride anyhow; head_dim is a multiple of 8.
inline bool cached_attention_aligned(const void* data, int64_t slot_stride, int64_t head_stride,
                                     CachedAttentionDtype cache_dtype) {
  const int64_t access = cached_attention_access(cache_dtype);
  const int64_t element = cache_dtype == CachedAttentionDtype::float32 ? 4 : access / 8;
  return reinterpret_cast<uintptr_t>(data) % access == 0 && slot_stride * element % access == 0 &&
         head_stride * element % access == 0;
}

// The longest cache that the kernels are meant and tested for.
constexpr int64_t kCachedAttentionMostPositions = 16384;

// Where a cache is long, enough blocks that the rows and heads of a small batch put two on each multiprocessor, which more
// of them do by themselves; no block has fewer keys than kCachedAttentionLeastShare while
// another has some, and the one that merges has at most kMost results to read. To merge takes about as long as to read
// some hundreds of keys, so caches of up to twice the least share are not shared.
constexpr int64_t kCachedAttentionLeastShare = 256;
inline int64_t cached_attention_splits(int64_t queries, int64_t capacity, int64_t multiprocessors) {
  constexpr int64_t kMost = 32;
  if (capacity <= 2 * kCachedAttentionLeastShare) return 1;
  const int64_t wanted = (2 * multiprocessors + queries - 1) / queries;
  const int64_t useful = (capacity + kCachedAttentionLeastShare - 1) / kCachedAttentionLeastShare;
  return std::max<int64_t>(1, std::min({wanted, useful, kMost}));
}
inline int64_t cached_attention_workspace(const CachedAttentionParams& p) {
  return p.splits == 1 ? 0 : p.rows * p.columns * p.heads * p.splits * (p.head_dim + 2);
}

int64_t cached_attention_multiprocessors();  // of the current device
void cached_attention_cuda(const CachedAttentionParams&, void* stream);

}  // namespace alitok
