// Small float32 matrix products for the CPU kernels: C = A B or C += A B with all of C's register block in registers.
// B and C are row-major with rows of whole vectors; A is read one element at a time and may lie transposed.
// Each element of C is one chain of fused multiply-adds over the depth, whatever the blocking.
#pragma once

#include <cstdint>

#include "simd.h"

namespace alitok::ALITOK_ISA {

// Element (r, k) of A at data[r * row_stride + k], or at data[k * row_stride + r] when Transposed.
template <bool Transposed>
struct LeftOperand {
  const float* data;
  int64_t stride;
  const float* at(int64_t r, int64_t k) const { return data + (Transposed ? k * stride + r : r * stride + k); }
};
inline LeftOperand<false> row_major(const float* data, int64_t stride) { return {data, stride}; }
inline LeftOperand<true> transposed(const float* data, int64_t stride) { return {data, stride}; }

// The widest register block that leaves registers for a row of B and an element of A.
#if defined(__AVX512F__)
constexpr int kBlockVectors = 4;
constexpr int block_rows(int vectors) { return vectors == 4 ? 6 : 8; }
#elif defined(__AVX2__)
constexpr int kBlockVectors = 2;
constexpr int block_rows(int vectors) { return vectors == 2 ? 6 : 8; }
#else
constexpr int kBlockVectors = 4;
constexpr int block_rows(int) { return 2; }
#endif

template <int Rows, int Vectors, bool Accumulate, class A>
inline void multiply_block(int64_t depth, A a, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Accumulate ? Vec::load(c + r * c_stride + v * Vec::lanes) : Vec();
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row[v] = Vec::load(b + k * b_stride + v * Vec::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec x = *a.at(r, k);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(x, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v].store(c + r * c_stride + v * Vec::lanes);
}

// All rows of a panel of `Vectors` vectors: blocks of Rows, then of half as many for what is left.
template <int Rows, int Vectors, bool Accumulate, class A>
inline void multiply_rows(int64_t rows, int64_t depth, A a, const float* b, int64_t b_stride, float* c,
                          int64_t c_stride) {
  for (; rows >= Rows; rows -= Rows, a.data = a.at(Rows, 0), c += Rows * c_stride)
    multiply_block<Rows, Vectors, Accumulate>(depth, a, b, b_stride, c, c_stride);
  if constexpr (Rows > 1) multiply_rows<Rows / 2, Vectors, Accumulate>(rows, depth, a, b, b_stride, c, c_stride);
}

template <int Vectors, bool Accumulate, class A>
inline void multiply_panel(int64_t vectors, int64_t rows, int64_t depth, A a, const float* b, int64_t b_stride,
                           float* c, int64_t c_stride) {
  if (vectors == Vectors) {
    multiply_rows<block_rows(Vectors), Vectors, Accumulate>(rows, depth, a, b, b_stride, c, c_stride);
  } else if constexpr (Vectors > 1) {
    multiply_panel<Vectors - 1, Accumulate>(vectors, rows, depth, a, b, b_stride, c, c_stride);
  }
}

// C (rows, vectors * lanes) = A (rows, depth) B (depth, vectors * lanes), added to C when Accumulate.
template <bool Accumulate = false, class A>
void multiply(int64_t rows, int64_t vectors, int64_t depth, A a, const float* b, int64_t b_stride, float* c,
              int64_t c_stride) {
  // Panels of nearly equal width: 5 vectors go as 3 + 2, not as 4 + 1.
  for (int64_t panels = (vectors + kBlockVectors - 1) / kBlockVectors; panels > 0; --panels) {
    const int64_t width = (vectors + panels - 1) / panels;
    multiply_panel<kBlockVectors, Accumulate>(width, rows, depth, a, b, b_stride, c, c_stride);
    vectors -= width;
    b += width * Vec::lanes;
    c += width * Vec::lanes;
  }
}

}  // namespace alitok::ALITOK_ISA
