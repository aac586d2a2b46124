// Products of bfloat16 matrices with float32 sums on AMX tiles. For functions of avx512 builds that have asked
// cpu_has_amx(); the tiles belong to the thread from construction to destruction of an AmxTiles.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define ALITOK_AMX __attribute__((target("amx-tile,amx-bf16")))

namespace alitok::ALITOK_ISA {

constexpr int64_t kAmxBlock = 32;  // every size of multiply_amx is a multiple of it

class AmxTiles {
 public:
  ALITOK_AMX AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    asm volatile("" : : "r"(&config) : "memory");  // of the intrinsic's operand, compilers know only a part
    _tile_loadconfig(&config);
  }
  ALITOK_AMX ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// C (rows, columns) float32 = A (rows, depth) B (depth, columns), added to C when Accumulate. A is bfloat16, row-major; B
// lies in pairs of rows: element (k, n) is half k % 2 of 32-bit word (k / 2, n). Strides from row to row (of words for B),
// in bytes.
template <bool Accumulate = false>
ALITOK_AMX inline void multiply_amx(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_stride,
                                    const void* b, int64_t b_stride, void* c, int64_t c_stride) {
  const auto at = [](const void* base, int64_t row, int64_t stride, int64_t byte) {
    return const_cast<char*>(static_cast<const char*>(base)) + row * stride + byte;
  };
  asm volatile("" ::: "memory");  // the tile loads below do not tell the compiler what they read
  for (int64_t n = 0; n < columns; n += 32) {
    for (int64_t m = 0; m < rows; m += 32) {
      if constexpr (Accumulate) {
        _tile_loadd(0, at(c, m, c_stride, n * 4), c_stride);
        _tile_loadd(1, at(c, m, c_stride, n * 4 + 64), c_stride);
        _tile_loadd(2, at(c, m + 16, c_stride, n * 4), c_stride);
        _tile_loadd(3, at(c, m + 16, c_stride, n * 4 + 64), c_stride);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < depth; k += 32) {
        _tile_loadd(4, at(a, m, a_stride, k * 2), a_stride);
        _tile_loadd(5, at(a, m + 16, a_stride, k * 2), a_stride);
        _tile_loadd(6, at(b, k / 2, b_stride, n * 4), b_stride);
        _tile_loadd(7, at(b, k / 2, b_stride, n * 4 + 64), b_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, at(c, m, c_stride, n * 4), c_stride);
      _tile_stored(1, at(c, m, c_stride, n * 4 + 64), c_stride);
      _tile_stored(2, at(c, m + 16, c_stride, n * 4), c_stride);
      _tile_stored(3, at(c, m + 16, c_stride, n * 4 + 64), c_stride);
    }
  }
  asm volatile("" ::: "memory");  // nor the tile stores what they write
}

}  // namespace alitok::ALITOK_ISA
