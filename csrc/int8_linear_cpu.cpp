// Rows are rounded first, in blocks of kRows; then each panel of weights meets all blocks. Within a group of inputs
// sums are exact integers; times both scales they add up in float32.
//
// The multiplication instruction takes one signed and one unsigned factor: the weights are stored 128 too large, and
// the sum of a group starts at -128 times the sum of the row's integers.
#include "int8_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "element.h"

namespace alitok {
namespace ALITOK_ISA {
namespace {

constexpr int kRows = 6;             // of a block: their sums and totals for a panel fill 24 of 32 registers
constexpr int64_t kMostBlocks = 42;  // rounded at a time: 252 rows of 1,024 inputs fill a quarter of the L2 cache

// kRows rows as integers of -127..127. Those of inputs k..k+3 are 4 kRows bytes at k * kRows, a row after the other.
struct Block {
  int8_t* values;
  int32_t* start;  // (groups, kRows): -128 times the sum of the group
  float* scale;    // (groups, kRows)
};

class RoundedRows {
 public:
  RoundedRows(int64_t blocks, int64_t groups)
      : groups_(groups),
        values_(static_cast<size_t>(blocks * groups * kRows * kInt8GroupInputs)),
        start_(static_cast<size_t>(blocks * groups * kRows)),
        scale_(start_.size()) {}

  Block block(int64_t b) {
    const int64_t first = b * groups_ * kRows;
    return {values_.data() + first * kInt8GroupInputs, start_.data() + first, scale_.data() + first};
  }

 private:
  int64_t groups_;
  std::vector<int8_t> values_;
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

template <class Type>
void round_row(const typename Type::Storage* x, int64_t inputs, int64_t groups, int row, Block block) {
  for (int64_t g = 0; g < groups; ++g) {
    float values[kInt8GroupInputs] = {};
    const int64_t first = g * kInt8GroupInputs, count = std::min(kInt8GroupInputs, inputs - first);
    for_vectors(count, [&](int64_t i, int n) { Type::load(x + first + i, n).store(values + i, n); });
    int8_t integers[kInt8GroupInputs];
    int32_t sum;
    block.scale[g * kRows + row] = round_group(values, integers, &sum);
    block.start[g * kRows + row] = -128 * sum;
    int8_t* to = block.values + first * kRows + 4 * row;
    for (int64_t i = 0; i < kInt8GroupInputs; i += 4, to += 4 * kRows) std::memcpy(to, integers + i, 4);
  }
}

// The products of a block with a panel, (kRows, kInt8PanelOutputs).
void multiply(const Block& block, const uint8_t* panel, int64_t groups, float* out) {
  const int8_t* x = block.values;
#if defined(__AVX512VNNI__)
  Vec total[kRows][2];
  for (int64_t g = 0; g < groups; ++g) {
    __m512i sum[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_set1_epi32(block.start[g * kRows + r]);
    for (int64_t k = 0; k < kInt8GroupInputs; k += 4, panel += 4 * kInt8PanelOutputs, x += 4 * kRows) {
      const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
      using Four = int32_t __attribute__((may_alias, aligned(1)));
      const Four* four = reinterpret_cast<const Four*>(x);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {  // by GCC 12's intrinsic each sum would be copied at each step
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[r][0]) : "v"(w0), "m"(four[r]));
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[r][1]) : "v"(w1), "m"(four[r]));
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
#else
  std::fill(out, out + kRows * kInt8PanelOutputs, 0.0f);
  for (int64_t g = 0; g < groups; ++g, panel += kInt8GroupBytes, x += kRows * kInt8GroupInputs) {
    const float* scale = reinterpret_cast<const float*>(panel + kInt8PanelOutputs * kInt8GroupInputs);
    for (int r = 0; r < kRows; ++r) {
      int32_t sum[kInt8PanelOutputs];
      std::fill(sum, sum + kInt8PanelOutputs, block.start[g * kRows + r]);
      for (int64_t k = 0; k < kInt8GroupInputs; k += 4) {
        const int8_t* four = x + k * kRows + 4 * r;
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
#endif
}

template <class X, class Out>
void run(const Int8LinearParams& p, const Parallel& parallel) {
  const auto* x = static_cast<const typename X::Storage*>(p.x);
  auto* out = static_cast<typename Out::Storage*>(p.out);
  const int64_t groups = (p.inputs + kInt8GroupInputs - 1) / kInt8GroupInputs;
  const int64_t panels = (p.outputs + kInt8PanelOutputs - 1) / kInt8PanelOutputs;
  const int64_t all_blocks = (p.rows + kRows - 1) / kRows;
  const int64_t passes = (all_blocks + kMostBlocks - 1) / kMostBlocks;
  const int64_t most_blocks = (all_blocks + passes - 1) / passes;
  RoundedRows rounded(most_blocks, groups);
  for (int64_t first_row = 0; first_row < p.rows; first_row += most_blocks * kRows) {
    const int64_t rows = std::min(most_blocks * kRows, p.rows - first_row), blocks = (rows + kRows - 1) / kRows;
    // What stands in a last block's missing rows is multiplied and not written.
    parallel(0, rows, 1 + 16384 / (1 + p.inputs), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        round_row<X>(x + (first_row + r) * p.inputs, p.inputs, groups, static_cast<int>(r % kRows),
                     rounded.block(r / kRows));
    });
    // With more threads than panels, each panel's blocks are shared.
    const int64_t shares = std::min<int64_t>(blocks, (4 * parallel.threads + panels - 1) / panels);
    parallel(0, panels * shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t panel = unit / shares, share = unit % shares, first_output = panel * kInt8PanelOutputs;
        const int64_t outputs = std::min(kInt8PanelOutputs, p.outputs - first_output);
        for (int64_t b = blocks * share / shares; b < blocks * (share + 1) / shares; ++b) {
          alignas(64) float product[kRows * kInt8PanelOutputs];
          multiply(rounded.block(b), p.weight + panel * groups * kInt8GroupBytes, groups, product);
          for (int64_t r = 0; r < std::min<int64_t>(kRows, rows - b * kRows); ++r) {
            auto* to = out + (first_row + b * kRows + r) * p.outputs + first_output;
            for_vectors(outputs, [&](int64_t i, int n) {
              const Vec added = p.bias == nullptr ? Vec() : Vec::load(p.bias + first_output + i, n);
              Out::store(to + i, Vec::load(product + r * kInt8PanelOutputs + i, n) + added, n);
            });
          }
        }
      }
    });
  }
}

}  // namespace

void int8_linear_cpu(const Int8LinearParams& p, const Parallel& parallel) {
  const bool narrow = p.out_dtype == Int8LinearDtype::bfloat16;
  if (p.x_dtype == Int8LinearDtype::bfloat16) {
    return narrow ? run<BFloat16, BFloat16>(p, parallel) : run<BFloat16, Float32>(p, parallel);
  }
  return narrow ? run<Float32, BFloat16>(p, parallel) : run<Float32, Float32>(p, parallel);
}

}  // namespace ALITOK_ISA
}  // namespace alitok
