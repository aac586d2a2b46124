// Rows are rounded first, in blocks; then each panel of weights meets all blocks. Within a group of inputs sums are exact
// integers; times both scales they add up in float32.
//
// The multiplication instructions take one signed and one unsigned factor: the weights are stored 128 too large, and the
// sum of a group starts at -128 times the sum of the row's integers.
#include "int8_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "element.h"
#include "linear_rows.h"
#if defined(__AVX512BF16__)
#include "amx_multiply.h"
#endif

namespace alitok {
namespace ALITOK_ISA {
namespace {

// Some rows as integers of -127..127, (groups, rows, kInt8GroupInputs).
struct Block {
  int8_t* values;
  int32_t* start;  // (groups, rows): -128 times the sum of the group
  float* scale;    // (groups, rows)
};

// Room for blocks of `rows` rows. What stands in a last block's missing rows is multiplied and not used.
class RoundedRows {
 public:
  RoundedRows(int64_t blocks, int64_t rows, int64_t groups)
      : size_(rows * groups),
        values_(blocks * size_ * kInt8GroupInputs / 4),
        start_(static_cast<size_t>(blocks * size_)),
        scale_(start_.size()) {}

  Block block(int64_t b) {
    auto* values = reinterpret_cast<int8_t*>(+values_);
    return {values + b * size_ * kInt8GroupInputs, start_.data() + b * size_, scale_.data() + b * size_};
  }

 private:
  int64_t size_;
  FloatBuffer values_;
  std::vector<int32_t> start_;
  std::vector<float> scale_;
};

// The largest magnitude becomes 127. Not finite: zeros and a scale of NaN. Too small to divide by: zeros.
float round_group(const float* x, int8_t* to, int32_t* sum) {
  int32_t largest = 0;  // as bits: a NaN is above infinity, infinity above all numbers
  for (int64_t i = 0; i < kInt8GroupInputs; ++i) largest = std::max(largest, bits_as<int32_t>(x[i]) & 0x7FFFFFFF);
  const float bound = bits_as<float>(largest), inverse = 127.0f / bound;
  if (!(bound <= std::numeric_limits<float>::max() && inverse <= std::numeric_limits<float>::max())) {
    std::memset(to, 0, kInt8GroupInputs);
    *sum = 0;
    return bound <= 1.0f ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  float whole[kInt8GroupInputs];
  for (int64_t i = 0; i < kInt8GroupInputs; i += Vec::lanes) round(Vec::load(x + i) * Vec(inverse)).store(whole + i);
  int32_t total = 0;
  for (int64_t i = 0; i < kInt8GroupInputs; ++i) {
    const int32_t q = static_cast<int32_t>(whole[i]);
    total += q;
    to[i] = static_cast<int8_t>(q);
  }
  *sum = total;
  return bound / 127.0f;
}

void round_row(const float* values, int64_t groups, int64_t rows, int64_t r, const Block& block) {
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = g * rows + r;
    int32_t sum;
    block.scale[at] = round_group(values + g * kInt8GroupInputs, block.values + at * kInt8GroupInputs, &sum);
    block.start[at] = -128 * sum;
  }
}

// Each multiplies a block of kRows rows by a panel, (kRows, kInt8PanelOutputs), and has a Setup, which a thread constructs
// before.

struct PlainProduct {
  static constexpr int64_t kRows = 6, kMostBlocks = 42;
  struct Setup {};
  static void multiply(const Block& block, const uint8_t* panel, int64_t groups, float* out) {
    std::fill(out, out + kRows * kInt8PanelOutputs, 0.0f);
    const int8_t* x = block.values;
    for (int64_t g = 0; g < groups; ++g, panel += kInt8GroupBytes, x += kRows * kInt8GroupInputs) {
      const float* scale = reinterpret_cast<const float*>(panel + kInt8PanelOutputs * kInt8GroupInputs);
      for (int64_t r = 0; r < kRows; ++r) {
        int32_t sum[kInt8PanelOutputs];
        std::fill(sum, sum + kInt8PanelOutputs, block.start[g * kRows + r]);
        for (int64_t k = 0; k < kInt8GroupInputs; k += 4) {
          const int8_t* four = x + r * kInt8GroupInputs + k;
          const uint8_t* w = panel + k * kInt8PanelOutputs;
          for (int64_t o = 0; o < kInt8PanelOutputs; ++o)
            for (int i = 0; i < 4; ++i) sum[o] += four[i] * w[4 * o + i];
        }
        const float row_scale = block.scale[g * kRows + r];
        float* total = out + r * kInt8PanelOutputs;
        for (int64_t o = 0; o < kInt8PanelOutputs; ++o)
          total[o] = std::fma(static_cast<float>(sum[o]), scale[o] * row_scale, total[o]);
      }
    }
  }
};

#if defined(__AVX512VNNI__)

struct VnniProduct {
  static constexpr int64_t kRows = 6;         // their sums and totals for a panel fill 24 of 32 registers
  static constexpr int64_t kMostBlocks = 42;  // 252 rows of 1,024 inputs fill a quarter of the second-level cache
  struct Setup {};
  static void multiply(const Block& block, const uint8_t* panel, int64_t groups, float* out) {
    Vec total[kRows][2];
    const int8_t* x = block.values;
    for (int64_t g = 0; g < groups; ++g, x += kRows * kInt8GroupInputs) {
      __m512i sum[kRows][2];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_set1_epi32(block.start[g * kRows + r]);
      for (int64_t k = 0; k < kInt8GroupInputs; k += 4, panel += 4 * kInt8PanelOutputs) {
        const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
        using Four = int32_t __attribute__((may_alias, aligned(1)));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {  // by GCC 12's intrinsic each sum would be copied at each step
          const Four* four = reinterpret_cast<const Four*>(x + r * kInt8GroupInputs + k);
          asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[r][0]) : "v"(w0), "m"(*four));
          asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[r][1]) : "v"(w1), "m"(*four));
        }
      }
      const float* scale = reinterpret_cast<const float*>(panel);
      const Vec scale0 = Vec::load(scale), scale1 = Vec::load(scale + 16);
      panel += kInt8PanelOutputs * sizeof(float);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec row_scale = block.scale[g * kRows + r];
        total[r][0] = fma(Vec(_mm512_cvtepi32_ps(sum[r][0])), scale0 * row_scale, total[r][0]);
        total[r][1] = fma(Vec(_mm512_cvtepi32_ps(sum[r][1])), scale1 * row_scale, total[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      total[r][0].store(out + r * kInt8PanelOutputs);
      total[r][1].store(out + r * kInt8PanelOutputs + 16);
    }
  }
};

// A group is one tile deep. The totals of 16 x 16 results stay in registers; the tiles' sums go through memory.
struct AmxProduct {
  static constexpr int64_t kRows = 32, kMostBlocks = 16;
  using Setup = AmxTiles;
  static void multiply(const Block& block, const uint8_t* panel, int64_t groups, float* out) {
    for (int64_t row = 0; row < kRows; row += 16)
      for (int64_t output = 0; output < kInt8PanelOutputs; output += 16)
        quarter(block, row, panel, output, groups, out + row * kInt8PanelOutputs + output);
  }

 private:
  __attribute__((target("amx-tile,amx-int8"))) static void quarter(const Block& block, int64_t row,
                                                                   const uint8_t* panel, int64_t output, int64_t groups,
                                                                   float* out) {
    constexpr int64_t kTileRow = 64, kPanelRow = 4 * kInt8PanelOutputs;
    alignas(64) int32_t sums[2][16][16];
    Vec total[16];
    const auto start_tile = [&](int64_t g) __attribute__((target("amx-tile,amx-int8"))) {
      _tile_zero(0);
      _tile_loadd(1, block.values + (g * kRows + row) * kInt8GroupInputs, kTileRow);
      _tile_loadd(2, panel + g * kInt8GroupBytes + 4 * output, kPanelRow);
      _tile_dpbsud(0, 1, 2);
      _tile_stored(0, sums[g % 2], kTileRow);
    };
    asm volatile("" ::: "memory");  // the tile instructions do not tell the compiler what they read and write
    if (groups > 0) start_tile(0);
    for (int64_t g = 0; g < groups; ++g) {
      if (g + 1 < groups) start_tile(g + 1);
      asm volatile("" ::: "memory");
      const uint8_t* scales = panel + g * kInt8GroupBytes + kInt8PanelOutputs * kInt8GroupInputs;
      const Vec scale = Vec::load(reinterpret_cast<const float*>(scales) + output);
      const int64_t at = g * kRows + row;
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums[g % 2][r]), _mm512_set1_epi32(block.start[at + r]));
        total[r] = fma(Vec(_mm512_cvtepi32_ps(sum)), scale * Vec(block.scale[at + r]), total[r]);
      }
      asm volatile("" ::: "memory");
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) total[r].store(out + r * kInt8PanelOutputs);
  }
};

#endif

template <class X, class Out>
struct Run {
  const PackedLinearParams& p;
  const Parallel& parallel;

  template <class Product>
  void run() const {
    constexpr int64_t kRows = Product::kRows;
    const int64_t groups = (p.inputs + kInt8GroupInputs - 1) / kInt8GroupInputs;
    const int64_t panels = (p.outputs + kInt8PanelOutputs - 1) / kInt8PanelOutputs;
    const int64_t blocks = (p.rows + kRows - 1) / kRows, slots = even_parts(blocks, Product::kMostBlocks);
    const auto* weight = static_cast<const uint8_t*>(p.weight);
    RoundedRows rounded(slots, kRows, groups);
    const bool stream = streams(p.rows * p.outputs * static_cast<int64_t>(sizeof(typename Out::Storage)));
    for_blocks_and_panels<typename Product::Setup>(
        blocks, panels, slots, parallel,
        [&](int64_t first, int64_t count) {
          pack_slots(count, groups * kInt8GroupInputs, parallel, [&](int64_t slot, float* values) {
            const int64_t row = (first + slot) * kRows;
            for (int64_t r = 0; r < std::min(kRows, p.rows - row); ++r) {
              load_row<X>(p, row + r, values);
              round_row(values, groups, kRows, r, rounded.block(slot));
            }
          });
        },
        [&](int64_t panel, int64_t first, int64_t begin, int64_t end) {
          alignas(64) float product[kRows * kInt8PanelOutputs];
          for (int64_t slot = begin; slot < end; ++slot) {
            Product::multiply(rounded.block(slot), weight + panel * groups * kInt8GroupBytes, groups, product);
            const int64_t row = (first + slot) * kRows, output = panel * kInt8PanelOutputs;
            for (int64_t r = 0; r < std::min(kRows, p.rows - row); ++r)
              store_row<Out>(p, row + r, output, std::min(kInt8PanelOutputs, p.outputs - output), stream,
                             product + r * kInt8PanelOutputs);
          }
        });
  }
};

struct WithTypes {
  const PackedLinearParams& p;
  const Parallel& parallel;
  template <class X, class Out>
  void run() const {
    const Run<X, Out> all{p, parallel};
#if defined(__AVX512VNNI__)
    return cpu_has_amx() ? all.template run<AmxProduct>() : all.template run<VnniProduct>();
#else
    return all.template run<PlainProduct>();
#endif
  }
};

}  // namespace

void int8_linear_cpu(const PackedLinearParams& p, const Parallel& parallel) {
  with_linear_types(p, WithTypes{p, parallel});
}

}  // namespace ALITOK_ISA
}  // namespace alitok
