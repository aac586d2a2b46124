// Products of a few rows of activations with one panel of packed weights (decode.h), for decode_cpu.cpp.
//
// Each weight format takes its activations in a form of its own, written by `pack_row`:
//   float32   as they are;
//   bfloat16  rounded; where Planes is 2 as a sum of two bfloat16 numbers, the second being what the first rounded off;
//   int8      as 16-bit integers with a scale for the row, split in two planes of unsigned bytes. Products with a group
//             of int8 weights then are exact sums of integers, and int8 multipliers do the work of 16-bit ones;
//   int8, narrow   as 8-bit integers with a scale for each group of inputs: half of the work, for products of many rows.
// A row's product depends neither on the other rows nor on how many there are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu_isa.h"
#include "decode.h"
#include "simd.h"

namespace alitok::ALITOK_ISA {

constexpr int64_t kRowBlock = 32;    // rows of one product: two AMX tiles
constexpr int64_t kPrefetch = 8192;  // bytes ahead of the weights in use, into the second-level cache
constexpr int64_t kStream = 4096;  // the same into the first-level cache, where memory and not arithmetic is the limit
constexpr int kFewRows = 2;        // up to so many rows it is

struct Activations {
  uint8_t* data;  // row r of plane q at data + r * row_bytes + q * plane_bytes
  float* scale;   // of each row, int8 only
  int64_t row_bytes, plane_bytes;

  const uint8_t* row(int64_t r) const { return data + r * row_bytes; }
};

// Which multiplication instructions a thread uses.
struct MatmulUnit {
  bool amx;
};

inline void prefetch_bytes(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(data) + i, 0, 2);
}

// Fetches weights that are read soon, a little with each step through kStepBytes of a panel. Where a panel is met by
// several blocks of rows, each fetches its share of the next panel: memory works as long as arithmetic does.
constexpr int64_t kStepBytes = 4 * kPanelOutputs;
class Ahead {
 public:
  Ahead(const uint8_t* panel, int64_t bytes, int64_t rows, int64_t block, int64_t blocks)
      : at_(blocks > 1 ? panel + bytes + bytes * block / blocks : panel + (rows <= kFewRows ? kStream : kPrefetch)),
        step_(kStepBytes / blocks) {}

  template <int Rows>
  void fetch() {
    constexpr int locality = Rows <= kFewRows ? 3 : 2;
    __builtin_prefetch(at_, 0, locality);
    if (step_ > 64) __builtin_prefetch(at_ + 64, 0, locality);
    at_ += step_;
  }

 private:
  const uint8_t* at_;
  int64_t step_;
};

// Rows in blocks of at most `Most`, a power of two: f(how many, the first one, what to fetch).
template <int Most, class F>
void for_row_blocks(const uint8_t* panel, int64_t bytes, int64_t rows, const F& f) {
  const int64_t last = rows % Most;
  const int64_t blocks = rows / Most + (last >> 2 & 1) + (last >> 1 & 1) + (last & 1);
  int64_t r = 0, block = 0;
  const auto some = [&](auto count) {
    f(count, r, Ahead(panel, bytes, count, block++, blocks));
    r += count;
  };
  while (r + Most <= rows) some(std::integral_constant<int, Most>());
  if constexpr (Most > 4)
    if (r + 4 <= rows) some(std::integral_constant<int, 4>());
  if constexpr (Most > 2)
    if (r + 2 <= rows) some(std::integral_constant<int, 2>());
  if constexpr (Most > 1)
    if (r < rows) some(std::integral_constant<int, 1>());
}

// ---- float32 ----

template <int Rows>
void multiply_float32(const uint8_t* panel, int64_t depth, const Activations& x, int64_t row0, Ahead ahead,
                      float* out) {
  const float* a[Rows];
  for (int r = 0; r < Rows; ++r) a[r] = reinterpret_cast<const float*>(x.row(row0 + r));
  for (int64_t first = 0; first < kPanelOutputs; first += 2 * Vec::lanes) {
    const float* w = reinterpret_cast<const float*>(panel) + first;
    Vec sum[Rows][2];
    for (int64_t k = 0; k < depth; ++k, w += kPanelOutputs) {
      if (first == 0) ahead.fetch<Rows>();
      const Vec w0 = Vec::load(w), w1 = Vec::load(w + Vec::lanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        sum[r][0] = fma(a[r][k], w0, sum[r][0]);
        sum[r][1] = fma(a[r][k], w1, sum[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      sum[r][0].store(out + r * kPanelOutputs + first);
      sum[r][1].store(out + r * kPanelOutputs + first + Vec::lanes);
    }
  }
}

struct Float32Weights {
  static constexpr WeightFormat kFormat = WeightFormat::float32;
  static constexpr int64_t row_bytes(int64_t depth) { return depth * 4; }

  static void pack_row(const float* values, int64_t n, int64_t depth, uint8_t* row, int64_t, float*) {
    float* out = reinterpret_cast<float*>(row);
    std::copy(values, values + n, out);
    std::fill(out + n, out + depth, 0.0f);
  }

  static void multiply(MatmulUnit, const uint8_t* panel, int64_t depth, const Activations& x, int64_t row0,
                       int64_t rows, float* out) {
    for_row_blocks<8>(panel, panel_bytes(kFormat, depth), rows, [&](auto count, int64_t r, Ahead ahead) {
      multiply_float32<count>(panel, depth, x, row0 + r, ahead, out + r * kPanelOutputs);
    });
  }
};

// ---- bfloat16 ----

template <int Rows, int Planes>
void multiply_bfloat16(const uint8_t* panel, int64_t depth, const Activations& x, int64_t row0,
                       [[maybe_unused]] Ahead ahead, float* out) {
  const uint32_t* a[Rows][Planes];  // pairs of neighbouring activations
  for (int r = 0; r < Rows; ++r)
    for (int q = 0; q < Planes; ++q) a[r][q] = reinterpret_cast<const uint32_t*>(x.row(row0 + r) + q * x.plane_bytes);
#if defined(__AVX512BF16__)
  __m512 sum[Rows][2];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth / 2; ++k, panel += 4 * kPanelOutputs) {
    ahead.fetch<Rows>();
    const __m512bh w0 = (__m512bh)_mm512_load_si512(panel), w1 = (__m512bh)_mm512_load_si512(panel + 64);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int q = 0; q < Planes; ++q) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r][q][k]));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], w0, pair);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], w1, pair);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    _mm512_storeu_ps(out + r * kPanelOutputs, sum[r][0]);
    _mm512_storeu_ps(out + r * kPanelOutputs + 16, sum[r][1]);
  }
#else
  std::fill(out, out + Rows * kPanelOutputs, 0.0f);
  const uint16_t* w = reinterpret_cast<const uint16_t*>(panel);
  for (int64_t k = 0; k < depth / 2; ++k, w += 2 * kPanelOutputs) {
    float even[kPanelOutputs], odd[kPanelOutputs];
    for (int64_t o = 0; o < kPanelOutputs; ++o) {
      uint32_t pair;
      std::memcpy(&pair, w + 2 * o, sizeof pair);
      const uint32_t low = pair << 16, high = pair & 0xFFFF0000u;
      std::memcpy(even + o, &low, sizeof low);
      std::memcpy(odd + o, &high, sizeof high);
    }
    for (int r = 0; r < Rows; ++r) {
      float first = 0.0f, second = 0.0f;
      for (int q = 0; q < Planes; ++q) {
        first += from_bf16(static_cast<uint16_t>(a[r][q][k]));
        second += from_bf16(static_cast<uint16_t>(a[r][q][k] >> 16));
      }
      for (int64_t o = 0; o < kPanelOutputs; ++o) out[r * kPanelOutputs + o] += first * even[o] + second * odd[o];
    }
  }
#endif
}

#if defined(__AVX512BF16__)
// One tile row holds four bytes of 16 outputs, so that a panel is read as two tiles side by side.
template <int Tiles, int Planes>
__attribute__((target("amx-tile,amx-bf16"))) void multiply_bfloat16_amx(const uint8_t* panel, int64_t depth,
                                                                        const Activations& x, int64_t row0,
                                                                        float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint8_t *a0 = x.row(row0), *a1 = x.row(row0 + 16);
  for (int64_t k = 0; k < depth; k += 32, panel += 2048, a0 += 64, a1 += 64) {
    prefetch_bytes(panel + kPrefetch, 2048);
    _tile_loadd(4, panel, 128);
    _tile_loadd(5, panel + 64, 128);
#pragma GCC unroll 2
    for (int q = 0; q < Planes; ++q) {
      _tile_loadd(6, a0 + q * x.plane_bytes, x.row_bytes);
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 6, 5);
      if (Tiles == 2) {
        _tile_loadd(7, a1 + q * x.plane_bytes, x.row_bytes);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
      }
    }
  }
  constexpr int64_t stride = kPanelOutputs * sizeof(float);
  _tile_stored(0, out, stride);
  _tile_stored(1, out + 16, stride);
  if (Tiles == 2) {
    _tile_stored(2, out + 16 * kPanelOutputs, stride);
    _tile_stored(3, out + 16 * kPanelOutputs + 16, stride);
  }
}
#endif

template <int Planes>
struct Bfloat16Weights {
  static constexpr WeightFormat kFormat = WeightFormat::bfloat16;
  static constexpr int64_t row_bytes(int64_t depth) { return Planes * depth * 2; }

  static void pack_row(const float* values, int64_t n, int64_t depth, uint8_t* row, int64_t plane_bytes, float*) {
    uint16_t* high = reinterpret_cast<uint16_t*>(row);
    uint16_t* low = reinterpret_cast<uint16_t*>(row + plane_bytes);
    for (int64_t i = 0; i < n; ++i) {
      high[i] = to_bf16(values[i]);
      if (Planes == 2) low[i] = to_bf16(values[i] - from_bf16(high[i]));
    }
    std::fill(high + n, high + depth, 0);
    if (Planes == 2) std::fill(low + n, low + depth, 0);
  }

  static void multiply(MatmulUnit unit, const uint8_t* panel, int64_t depth, const Activations& x, int64_t row0,
                       int64_t rows, float* out) {
#if defined(__AVX512BF16__)
    if (unit.amx) {  // its sums are ordered otherwise than those of vdpbf16ps: the choice may not hang on the rows
      if (rows > 16) return multiply_bfloat16_amx<2, Planes>(panel, depth, x, row0, out);
      return multiply_bfloat16_amx<1, Planes>(panel, depth, x, row0, out);
    }
#endif
    (void)unit;
    for_row_blocks<8>(panel, panel_bytes(kFormat, depth), rows, [&](auto count, int64_t r, Ahead ahead) {
      multiply_bfloat16<count, Planes>(panel, depth, x, row0 + r, ahead, out + r * kPanelOutputs);
    });
  }
};

// ---- int8 ----
// A row holds u = q + 32768 with q = round(x / scale) in -32767..32767, as the bytes high = u >> 8 and low = u & 255.
// Within a group of inputs sum u w = 256 sum high w + sum low w, exact in 32 bits. Times the group's scale these add up
// to the product in float32, less the panel's offset: 32768 times the sum of the scaled weights.

constexpr float kInt16Largest = 32767.0f;
constexpr int64_t kScaleBytes = kPanelOutputs * sizeof(uint16_t);
constexpr int64_t kGroupBytes = kPanelOutputs * kGroupInputs + kScaleBytes;
static_assert(255 * 127 * kGroupInputs < INT32_MAX / 257, "the sums of a group fit");

#if defined(__AVX512F__)
inline Vec with_group(Vec total, __m512i high, __m512i low, const uint16_t* scales) {
  const __m512i sums = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  return fma(_mm512_cvtepi32_ps(sums), Vec::load_bf16(scales), total);
}
#endif

// The same for all outputs of a row.
inline void add_group(const int32_t* high, const int32_t* low, const uint16_t* scales, float* total) {
#if defined(__AVX512F__)
  for (int64_t o = 0; o < kPanelOutputs; o += 16)
    with_group(Vec::load(total + o), _mm512_loadu_si512(high + o), _mm512_loadu_si512(low + o), scales + o)
        .store(total + o);
#else
  for (int64_t o = 0; o < kPanelOutputs; ++o)
    total[o] = std::fma(static_cast<float>(256 * high[o] + low[o]), from_bf16(scales[o]), total[o]);
#endif
}

template <int Rows>
void multiply_int8(const uint8_t* panel, int64_t depth, const Activations& x, int64_t row0,
                   [[maybe_unused]] Ahead ahead, float* out) {
  const float* offset = reinterpret_cast<const float*>(panel + depth / kGroupInputs * kGroupBytes);
#if defined(__AVX512VNNI__)
  const uint8_t* a[Rows][2];
  for (int r = 0; r < Rows; ++r)
    for (int q = 0; q < 2; ++q) a[r][q] = x.row(row0 + r) + q * x.plane_bytes;
  Vec total[Rows][2];
  for (int64_t group = 0; group < depth; group += kGroupInputs) {
    __m512i sum[Rows][2][2];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
      for (int q = 0; q < 2; ++q) sum[r][q][0] = sum[r][q][1] = _mm512_setzero_si512();
    for (int64_t k = group; k < group + kGroupInputs; k += 4, panel += 4 * kPanelOutputs) {
      ahead.fetch<Rows>();
      const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q) {  // by GCC 12's intrinsic each sum would be copied at each step
          int32_t four;
          std::memcpy(&four, a[r][q] + k, sizeof four);
          const __m512i value = _mm512_set1_epi32(four);
          asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][q][0]) : "v"(value), "v"(w0));
          asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][q][1]) : "v"(value), "v"(w1));
        }
      }
    }
    ahead.fetch<Rows>();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        total[r][half] = with_group(total[r][half], sum[r][0][half], sum[r][1][half], scales + 16 * half);
    panel = reinterpret_cast<const uint8_t*>(scales + kPanelOutputs);
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Vec product = (total[r][half] - Vec::load(offset + 16 * half)) * Vec(x.scale[row0 + r]);
      product.store(out + r * kPanelOutputs + 16 * half);
    }
#else
  for (int r = 0; r < Rows; ++r) {
    float total[kPanelOutputs] = {};
    const uint8_t* group = panel;
    for (int64_t first = 0; first < depth; first += kGroupInputs, group += kGroupBytes) {
      const int8_t* weights = reinterpret_cast<const int8_t*>(group);
      int32_t sum[2][kPanelOutputs] = {};
      for (int q = 0; q < 2; ++q) {
        const uint8_t* a = x.row(row0 + r) + q * x.plane_bytes + first;
        for (int64_t k = 0; k < kGroupInputs; k += 4) {
          const int8_t* w = weights + k * kPanelOutputs;
          for (int64_t o = 0; o < kPanelOutputs; ++o)
            for (int i = 0; i < 4; ++i) sum[q][o] += a[k + i] * w[o * 4 + i];
        }
      }
      add_group(sum[0], sum[1], reinterpret_cast<const uint16_t*>(group + kGroupInputs * kPanelOutputs), total);
    }
    for (int64_t o = 0; o < kPanelOutputs; ++o) out[r * kPanelOutputs + o] = (total[o] - offset[o]) * x.scale[row0 + r];
  }
#endif
}

#if defined(__AVX512VNNI__)
__attribute__((target("amx-tile,amx-int8"))) inline void multiply_int8_amx(const uint8_t* panel, int64_t depth,
                                                                           const Activations& x, int64_t row0,
                                                                           int64_t rows, float* out) {
  alignas(64) int32_t sum[2][16][kPanelOutputs];
  alignas(64) float total[16][kPanelOutputs] = {};
  constexpr int64_t stride = kPanelOutputs * sizeof(int32_t);
  const uint8_t* a = x.row(row0);
  for (int64_t group = 0; group < depth; group += kGroupInputs, panel += kScaleBytes) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < kGroupInputs; k += 64, panel += 2048, a += 64) {
      prefetch_bytes(panel + kPrefetch, 2048);
      _tile_loadd(4, panel, 128);
      _tile_loadd(5, panel + 64, 128);
      _tile_loadd(6, a, x.row_bytes);
      _tile_loadd(7, a + x.plane_bytes, x.row_bytes);
      _tile_dpbusd(0, 6, 4);
      _tile_dpbusd(1, 6, 5);
      _tile_dpbusd(2, 7, 4);
      _tile_dpbusd(3, 7, 5);
    }
    _tile_stored(0, sum[0][0], stride);
    _tile_stored(1, sum[0][0] + 16, stride);
    _tile_stored(2, sum[1][0], stride);
    _tile_stored(3, sum[1][0] + 16, stride);
    asm volatile("" ::: "memory");  // the stores do not tell the compiler what they write
    prefetch_bytes(panel + kPrefetch, kScaleBytes);
    for (int64_t r = 0; r < rows; ++r)
      add_group(sum[0][r], sum[1][r], reinterpret_cast<const uint16_t*>(panel), total[r]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Vec row_scale = x.scale[row0 + r];
    for (int64_t o = 0; o < kPanelOutputs; o += Vec::lanes) {
      const Vec offset = Vec::load(reinterpret_cast<const float*>(panel) + o);
      ((Vec::load(total[r] + o) - offset) * row_scale).store(out + r * kPanelOutputs + o);
    }
  }
}
#endif

// NaN where there is one.
inline float largest_magnitude(const float* values, int64_t n) {
  int32_t largest = 0;  // as bits: a NaN is above infinity, infinity above all numbers
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    largest = std::max(largest, bits & 0x7FFFFFFF);
  }
  float bound;
  std::memcpy(&bound, &largest, sizeof bound);
  return bound;
}

struct Int8Weights {
  static constexpr WeightFormat kFormat = WeightFormat::int8;
  static constexpr int64_t row_bytes(int64_t depth) { return 2 * depth; }

  static void pack_row(const float* values, int64_t n, int64_t depth, uint8_t* row, int64_t plane_bytes, float* scale) {
    uint8_t *high = row, *low = row + plane_bytes;
    const float bound = largest_magnitude(values, n);
    const bool finite = bound < std::numeric_limits<float>::infinity();  // not NaN either
    const float inverse = finite && bound > 0 ? kInt16Largest / bound : 0.0f;
    *scale = finite ? bound / kInt16Largest : std::numeric_limits<float>::quiet_NaN();
    if (!finite || !(inverse < std::numeric_limits<float>::infinity())) {
      std::fill(high, high + depth, 128);
      std::fill(low, low + depth, 0);
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int32_t u = static_cast<int32_t>(values[i] * inverse + 32768.5f);  // truncation of a positive number
      high[i] = static_cast<uint8_t>(u >> 8);
      low[i] = static_cast<uint8_t>(u);
    }
    std::fill(high + n, high + depth, 128);
    std::fill(low + n, low + depth, 0);
  }

  static void multiply(MatmulUnit unit, const uint8_t* panel, int64_t depth, const Activations& x, int64_t row0,
                       int64_t rows, float* out) {
#if defined(__AVX512VNNI__)
    constexpr int64_t kWorthTile = 4;  // fewer rows leave a tile mostly empty
    if (unit.amx && rows > kWorthTile) {
      for (int64_t r = 0; r < rows; r += 16)
        multiply_int8_amx(panel, depth, x, row0 + r, std::min<int64_t>(rows - r, 16), out + r * kPanelOutputs);
      return;
    }
#endif
    (void)unit;
    for_row_blocks<4>(panel, panel_bytes(kFormat, depth), rows, [&](auto count, int64_t r, Ahead ahead) {
      multiply_int8<count>(panel, depth, x, row0 + r, ahead, out + r * kPanelOutputs);
    });
  }
};

// ---- int8, with activations of 8 bits ----
// A row holds q = round(x / scale) in -127..127, with a scale for each group of inputs; behind all of them what is to be
// known of each group. The sums of a group are exact in 32 bits, whatever computes them. They are scaled by the row's
// scale, then by the output's, and added up in float32.

constexpr float kInt8Largest = 127.0f;

struct ActivationGroup {
  float scale;
  int32_t excess;  // -128 times the sum of q: VNNI multiplies unsigned numbers by signed ones, and takes w + 128 for w
};

// The row's part of the groups.
inline const ActivationGroup* activation_groups(const Activations& x, int64_t row, int64_t depth) {
  return reinterpret_cast<const ActivationGroup*>(x.row(row) + depth);
}

// Adds the sums of a group for all outputs of a row.
[[maybe_unused]] inline void add_int8_group(const int32_t* sums, float row_scale, const uint16_t* scales,
                                            float* total) {
  for (int64_t o = 0; o < kPanelOutputs; ++o)
    total[o] = std::fma(static_cast<float>(sums[o]) * row_scale, from_bf16(scales[o]), total[o]);
}

#if defined(__AVX512VNNI__)
constexpr int kInt8Rows = 8;  // of one product: their sums fill half of the registers

inline Vec with_int8_group(Vec total, __m512i sums, float row_scale, Vec scales) {
  return fma(Vec(_mm512_cvtepi32_ps(sums)) * Vec(row_scale), scales, total);
}

template <int Rows>
void multiply_int8_by_int8(const uint8_t* panel, int64_t depth, const Activations& x, int64_t row0, Ahead ahead,
                           float* out) {
  const uint8_t* a[Rows];
  const ActivationGroup* groups[Rows];
  for (int r = 0; r < Rows; ++r) {
    a[r] = x.row(row0 + r);
    groups[r] = activation_groups(x, row0 + r, depth);
  }
  const __m512i flip = _mm512_set1_epi8(-128);  // signed to unsigned
  Vec total[Rows][2];
  for (int64_t group = 0; group < depth / kGroupInputs; ++group) {
    __m512i sum[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = _mm512_set1_epi32(groups[r][group].excess);
#pragma GCC unroll 2
    for (int64_t k = 0; k < kGroupInputs; k += 4) {
      ahead.fetch<Rows>();
      const uint8_t* w = panel + k * kPanelOutputs;
      const __m512i w0 = _mm512_xor_si512(_mm512_load_si512(w), flip);
      const __m512i w1 = _mm512_xor_si512(_mm512_load_si512(w + 64), flip);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        int32_t four;
        std::memcpy(&four, a[r] + k, sizeof four);
        const __m512i value = _mm512_set1_epi32(four);
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][0]) : "v"(w0), "v"(value));
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][1]) : "v"(w1), "v"(value));
      }
    }
    ahead.fetch<Rows>();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + kGroupInputs * kPanelOutputs);
    const Vec low = Vec::load_bf16(scales), high = Vec::load_bf16(scales + 16);
    panel += kGroupBytes;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      a[r] += kGroupInputs;
      const float row_scale = groups[r][group].scale;
      total[r][0] = with_int8_group(total[r][0], sum[r][0], row_scale, low);
      total[r][1] = with_int8_group(total[r][1], sum[r][1], row_scale, high);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    total[r][0].store(out + r * kPanelOutputs);
    total[r][1].store(out + r * kPanelOutputs + 16);
  }
}

__attribute__((target("amx-tile,amx-int8"))) inline void multiply_int8_by_int8_amx(const uint8_t* panel, int64_t depth,
                                                                                   const Activations& x, int64_t row0,
                                                                                   int64_t rows, float* out) {
  alignas(64) int32_t sum[16][kPanelOutputs];
  constexpr int64_t stride = kPanelOutputs * sizeof(int32_t);
  const uint8_t* a = x.row(row0);
  std::fill(out, out + rows * kPanelOutputs, 0.0f);
  static_assert(kGroupInputs == 64, "a tile has a group");
  for (int64_t group = 0; group < depth / kGroupInputs; ++group, a += kGroupInputs) {
    _tile_zero(0);
    _tile_zero(1);
    prefetch_bytes(panel + kPrefetch, kGroupBytes);
    _tile_loadd(4, panel, 128);
    _tile_loadd(5, panel + 64, 128);
    _tile_loadd(6, a, x.row_bytes);
    _tile_dpbssd(0, 6, 4);
    _tile_dpbssd(1, 6, 5);
    _tile_stored(0, sum[0], stride);
    _tile_stored(1, sum[0] + 16, stride);
    asm volatile("" ::: "memory");  // the stores do not tell the compiler what they write
    panel += kGroupInputs * kPanelOutputs;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel);
    const Vec low = Vec::load_bf16(scales), high = Vec::load_bf16(scales + 16);
    for (int64_t r = 0; r < rows; ++r) {
      const float row_scale = activation_groups(x, row0 + r, depth)[group].scale;
      float* total = out + r * kPanelOutputs;
      with_int8_group(Vec::load(total), _mm512_load_si512(sum[r]), row_scale, low).store(total);
      with_int8_group(Vec::load(total + 16), _mm512_load_si512(sum[r] + 16), row_scale, high).store(total + 16);
    }
    panel += kScaleBytes;
  }
}
#elif defined(__AVX2__)
constexpr int kInt8Rows = 2;

template <int Rows>
void multiply_int8_by_int8(const uint8_t* panel, int64_t depth, const Activations& x, int64_t row0, Ahead ahead,
                           float* out) {
  std::fill(out, out + Rows * kPanelOutputs, 0.0f);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t group = 0; group < depth / kGroupInputs; ++group) {
    __m256i sum[Rows][4];
    for (int r = 0; r < Rows; ++r)
      for (int i = 0; i < 4; ++i) sum[r][i] = _mm256_setzero_si256();
    for (int64_t k = group * kGroupInputs; k < (group + 1) * kGroupInputs; k += 4, panel += 4 * kPanelOutputs) {
      ahead.fetch<Rows>();
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r) {
        int32_t four;
        std::memcpy(&four, x.row(row0 + r) + k, sizeof four);
        const __m256i value = _mm256_set1_epi32(four), size = _mm256_abs_epi8(value);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {  // |q| times w with the sign of q: pairs of products fit in 16 bits
          const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel) + i);
          const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(w, value));
          sum[r][i] = _mm256_add_epi32(sum[r][i], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel);
    for (int r = 0; r < Rows; ++r) {
      alignas(32) int32_t sums[kPanelOutputs];
      for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(sums) + i, sum[r][i]);
      add_int8_group(sums, activation_groups(x, row0 + r, depth)[group].scale, scales, out + r * kPanelOutputs);
    }
    panel += kScaleBytes;
  }
}
#else
constexpr int kInt8Rows = 1;

template <int Rows>
void multiply_int8_by_int8(const uint8_t* panel, int64_t depth, const Activations& x, int64_t row0, Ahead, float* out) {
  static_assert(Rows == 1);
  std::fill(out, out + kPanelOutputs, 0.0f);
  const int8_t* a = reinterpret_cast<const int8_t*>(x.row(row0));
  for (int64_t group = 0; group < depth / kGroupInputs; ++group, panel += kGroupBytes) {
    const int8_t* weights = reinterpret_cast<const int8_t*>(panel);
    int32_t sums[kPanelOutputs] = {};
    for (int64_t k = 0; k < kGroupInputs; k += 4, weights += 4 * kPanelOutputs) {
      for (int64_t o = 0; o < kPanelOutputs; ++o)
        for (int i = 0; i < 4; ++i) sums[o] += a[group * kGroupInputs + k + i] * weights[o * 4 + i];
    }
    add_int8_group(sums, activation_groups(x, row0, depth)[group].scale, reinterpret_cast<const uint16_t*>(weights),
                   out);
  }
}
#endif

struct Int8WeightsAndActivations {
  static constexpr WeightFormat kFormat = WeightFormat::int8;

  static constexpr int64_t row_bytes(int64_t depth) {
    return round_up(depth + depth / kGroupInputs * int64_t{sizeof(ActivationGroup)}, 64);
  }

  static void pack_row(const float* values, int64_t n, int64_t depth, uint8_t* row, int64_t, float*) {
    int8_t* q = reinterpret_cast<int8_t*>(row);
    auto* groups = reinterpret_cast<ActivationGroup*>(row + depth);
    for (int64_t first = 0; first < depth; first += kGroupInputs, ++groups) {
      const int64_t count = std::min(kGroupInputs, n - first);
      const float bound = largest_magnitude(values + first, count);
      const bool finite = bound < std::numeric_limits<float>::infinity();  // not NaN either
      float inverse = finite && bound > 0 ? kInt8Largest / bound : 0.0f;
      if (!(inverse < std::numeric_limits<float>::infinity())) inverse = 0.0f;
      groups->scale = !finite ? std::numeric_limits<float>::quiet_NaN() : inverse > 0 ? bound / kInt8Largest : 0.0f;
      int32_t sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int32_t value = inverse > 0 ? static_cast<int32_t>(values[first + i] * inverse + 128.5f) - 128 : 0;
        q[first + i] = static_cast<int8_t>(value);
        sum += value;
      }
      std::fill(q + first + count, q + first + kGroupInputs, int8_t{0});
      groups->excess = -128 * sum;
    }
  }

  static void multiply(MatmulUnit unit, const uint8_t* panel, int64_t depth, const Activations& x, int64_t row0,
                       int64_t rows, float* out) {
#if defined(__AVX512VNNI__)
    constexpr int64_t kWorthTile = 8;
    if (unit.amx && rows > kWorthTile) {
      for (int64_t r = 0; r < rows; r += 16) {
        const int64_t count = std::min<int64_t>(rows - r, 16);
        multiply_int8_by_int8_amx(panel, depth, x, row0 + r, count, out + r * kPanelOutputs);
      }
      return;
    }
#endif
    (void)unit;
    for_row_blocks<kInt8Rows>(panel, panel_bytes(kFormat, depth), rows, [&](auto count, int64_t r, Ahead ahead) {
      multiply_int8_by_int8<count>(panel, depth, x, row0 + r, ahead, out + r * kPanelOutputs);
    });
  }
};

}  // namespace alitok::ALITOK_ISA
