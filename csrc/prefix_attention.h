// prefix_attention: softmax attention over packed qkv (B, L, 3, H, D); position i sees j when j < prefix_len or j <= i.
// Optional RMSNorm of queries and keys, rotary table, and counter-based dropout on the probabilities.
// The definition is prefix_attention_reference in alitok_fast/ops/prefix_attention.py.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "dropout.h"
#include "parallel.h"

namespace alitok {

enum class AttentionDtype : int { float32, bfloat16, float16 };

struct PrefixAttentionParams {
  AttentionDtype dtype;  // of qkv, out and their gradients
  int64_t batch, length, heads, head_dim;
  int64_t prefix_len;

  // Element (b, i, part, h, d) lies at b * batch_stride + i * row_stride + (part * heads + h) * head_dim + d
  // with part 0, 1, 2 for query, key, value. Strides in elements; qkv is aligned to one element only.
  const void* qkv;
  int64_t qkv_batch_stride, qkv_row_stride;

  // Both null or both (head_dim). Used as rounded to `dtype`: y = round(round(x * rstd) * round(w)).
  const float* q_norm_weight;
  const float* k_norm_weight;
  float norm_eps;
  const float* rope;  // null, or (length, head_dim / 2, 2) contiguous: cos, sin. y rounds to `dtype` after it.
  float scale;        // on the logits, in natural-log units

  Dropout dropout;  // on the probabilities: head b * heads + h, row i, column j of dropout.h

  void* out;        // (B, L, H, D) contiguous
  float* lse;       // (B, H, L) natural log of sum_j exp(scale * q.k), before dropout
  void* workspace;  // as many bytes as the *_workspace function says, aligned to 64; null for 0
};

struct PrefixAttentionBackwardParams {
  PrefixAttentionParams forward;  // its out and lse are inputs here
  const void* grad_out;           // (B, L, H, D) contiguous
  void* grad_qkv;                 // (B, L, 3, H, D) contiguous, every element written
  float* grad_q_norm_weight;      // (head_dim), null when there are no weights
  float* grad_k_norm_weight;
};

// Batch, length, heads >= 1 (the glue answers empty batches); head_dim a multiple of 8 in 8..128.
// Each result is a function of the inputs alone, not of thread count or scheduling.
ALITOK_DECLARE_PER_ISA(void prefix_attention_cpu(const PrefixAttentionParams&, const Parallel&));
ALITOK_DECLARE_PER_ISA(void prefix_attention_backward_cpu(const PrefixAttentionBackwardParams&, const Parallel&));

// Each head's share of the gradients of the norm weights, summed in a fixed order at the end.
inline int64_t prefix_attention_backward_workspace_cpu(const PrefixAttentionParams& p) {
  return p.q_norm_weight == nullptr ? 0 : p.batch * p.heads * 2 * p.head_dim * static_cast<int64_t>(sizeof(float));
}

// The longest sequence: a CUDA block takes at least 64 rows, along a side of the grid that ends at 65535.
constexpr int64_t kPrefixAttentionMostLength = int64_t{65535} * 64;

void prefix_attention_cuda(const PrefixAttentionParams&, void* stream);
void prefix_attention_backward_cuda(const PrefixAttentionBackwardParams&, void* stream);
int64_t prefix_attention_workspace_cuda(const PrefixAttentionParams&);
int64_t prefix_attention_backward_workspace_cuda(const PrefixAttentionParams&);

}  // namespace alitok
