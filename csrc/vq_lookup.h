// vq_lookup: the nearest code of each feature and the closest feature of each code, in one pass over their distances.
// The definition is vq_lookup_reference in alitok_fast/ops/vq_lookup.py.
//
// Both searches compare halves of squared distances, less the term that is the same for all candidates:
//   |e|^2 / 2 - z.e         for the nearest code,
//   |z|^2 / 2 + that        for the closest feature,
// the norms summed in double and rounded, the products subtracted channel after channel. The order never depends on
// position or threads, so equal codes tie exactly and the lowest index wins.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "parallel.h"

namespace alitok {

struct VqLookupParams {
  int64_t features, codes, channels;  // N >= 0, K >= 1, C >= 1; N and K below 2^31
  float commitment;
  const float* z;         // (N, C) contiguous
  const float* codebook;  // (K, C) contiguous
  float* quantized;       // (N, C)
  int64_t* indices;       // (N)
  float* loss;            // one element
  int64_t* usage;         // (K)
  int64_t* closest;       // (K), or null when it is not wanted
  void* workspace;        // CUDA: as much as vq_lookup_workspace_cuda() says; CPU: unused
};

struct VqLookupBackwardParams {
  int64_t features, codes, channels;
  float commitment;
  const float* grad_quantized;  // (N, C) contiguous
  const float* grad_loss;       // one element
  const float* z;
  const float* codebook;
  const int64_t* indices;  // (N); the CPU's are in [0, K), CUDA's kernel looks itself
  float* grad_z;           // (N, C)
  float* grad_codebook;    // (K, C)
};

// Candidates for a code's closest feature as integers whose order is that of (score, feature): a minimum over them is
// the same in whatever order it is taken. `bits` are those of a score that is neither NaN nor -0.
constexpr uint64_t kNoFeature = ~uint64_t{0};

constexpr uint64_t closest_key(uint32_t bits, uint32_t feature) {
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | feature;
}

// A code without any finite distance gets feature 0; without any feature, -1.
constexpr int64_t closest_feature(uint64_t key, int64_t features) {
  return key != kNoFeature ? static_cast<int64_t>(key & 0xFFFFFFFFu) : features > 0 ? 0 : -1;
}

ALITOK_DECLARE_PER_ISA(void vq_lookup_cpu(const VqLookupParams&, const Parallel&));
ALITOK_DECLARE_PER_ISA(void vq_lookup_backward_cpu(const VqLookupBackwardParams&, const Parallel&));

// Features of one CUDA block.
constexpr int64_t kVqLookupBlock = 128;
// The most channels: CUDA's backward pass gives 32 to a block, along a side of the grid that ends at 65535. Limits like
// this one hold on every device, so that what runs on the CPU runs on CUDA.
constexpr int64_t kVqLookupMostChannels = int64_t{65535} * 32;

// Bytes, aligned to 8: a partial loss (double) for each block, and the half norm of each code.
inline int64_t vq_lookup_workspace_cuda(const VqLookupParams& p) {
  const int64_t blocks = (p.features + kVqLookupBlock - 1) / kVqLookupBlock;
  return blocks * static_cast<int64_t>(sizeof(double)) + p.codes * static_cast<int64_t>(sizeof(float));
}

// Outputs are the same in every run: integer atomics only, sums in a fixed order.
void vq_lookup_cuda(const VqLookupParams&, void* stream);
void vq_lookup_backward_cuda(const VqLookupBackwardParams&, void* stream);

}  // namespace alitok
