// Sums over the rows of a matrix, for gradients of weights: each block of a kernel has left a row of partial sums.
// Everything is added in an order that the sizes alone decide, so that the bits are the same in every run.
#pragma once

#include "cuda_kernel.h"

namespace alitok {

constexpr int kSumThreads = 1024, kSumColumns = 8;  // of a block: 32 bytes of each row, which is what memory moves

inline unsigned column_sum_blocks(int64_t width) {
  return static_cast<unsigned>((width + kSumColumns - 1) / kSumColumns);
}

// to[column] = the sum of from[row * width + column] over all rows, for the columns of block blockIdx.x. Every 128th row
// is added up by one thread: so few rows follow one another, and their loads do not wait for the additions.
__device__ __forceinline__ void sum_columns(const float* from, int64_t rows, int64_t width, float* to) {
  constexpr int kApart = kSumThreads / kSumColumns, kWarps = kSumThreads / 32;
  __shared__ float sums[kWarps][kSumColumns];
  const int place = static_cast<int>(threadIdx.x) % kSumColumns, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + place;
  float sum = 0.0f;
  if (column < width) {
#pragma unroll 8
    for (int64_t row = threadIdx.x / kSumColumns; row < rows; row += kApart) sum += from[row * width + column];
  }
#pragma unroll
  for (int distance = kSumColumns; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 < kSumColumns) sums[warp][place] = sum;
  __syncthreads();
  if (threadIdx.x >= kSumColumns || column >= width) return;
#pragma unroll
  for (int other = 1; other < kWarps; ++other) sum += sums[other][place];
  to[column] = sum;
}

}  // namespace alitok
