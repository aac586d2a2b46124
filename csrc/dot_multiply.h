// Products of bfloat16 matrices with float32 sums by vdpbf16ps: what amx_multiply.h does, for machines without tiles and
// any number of rows. For avx512 builds.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace alitok::ALITOK_ISA {

// The operands lie as for multiply_amx, strides in bytes too; `pairs` is half the depth.
template <bool Accumulate, int Rows, int Vectors>
inline void dot_block(int64_t pairs, const char* a, int64_t a_stride, const char* b, int64_t b_stride, char* c,
                      int64_t c_stride) {
  __m512 sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      sum[r][v] = Accumulate ? _mm512_loadu_ps(c + r * c_stride + v * 64) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + k * b_stride + v * 64);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * a_stride + k * 4, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, row[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + r * c_stride + v * 64, sum[r][v]);
}

template <bool Accumulate, int Rows, int Vectors>
inline void dot_rows(int64_t rows, int64_t pairs, const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                     char* c, int64_t c_stride) {
  for (; rows >= Rows; rows -= Rows, a += Rows * a_stride, c += Rows * c_stride)
    dot_block<Accumulate, Rows, Vectors>(pairs, a, a_stride, b, b_stride, c, c_stride);
  if constexpr (Rows > 1) dot_rows<Accumulate, Rows / 2, Vectors>(rows, pairs, a, a_stride, b, b_stride, c, c_stride);
}

template <bool Accumulate, int Vectors>
inline void dot_panel(int64_t vectors, int64_t rows, int64_t pairs, const char* a, int64_t a_stride, const char* b,
                      int64_t b_stride, char* c, int64_t c_stride) {
  if (vectors == Vectors) {
    dot_rows<Accumulate, Vectors == 4 ? 6 : 8, Vectors>(rows, pairs, a, a_stride, b, b_stride, c, c_stride);
  } else if constexpr (Vectors > 1) {
    dot_panel<Accumulate, Vectors - 1>(vectors, rows, pairs, a, a_stride, b, b_stride, c, c_stride);
  }
}

// multiply_amx for `columns` a multiple of 16 and an even `depth`. Strides in bytes.
template <bool Accumulate = false>
inline void multiply_dot(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_stride, const void* b,
                         int64_t b_stride, void* c, int64_t c_stride) {
  int64_t vectors = columns / 16, at = 0;
  for (int64_t panels = (vectors + 3) / 4; panels > 0; --panels) {  // of nearly equal width, as in tile_multiply.h
    const int64_t width = (vectors + panels - 1) / panels;
    dot_panel<Accumulate, 4>(width, rows, depth / 2, static_cast<const char*>(a), a_stride,
                             static_cast<const char*>(b) + at, b_stride, static_cast<char*>(c) + at, c_stride);
    vectors -= width;
    at += width * 64;
  }
}

}  // namespace alitok::ALITOK_ISA
