// What the kernels of fused_linear share: how a lane loads 8- and 16-bit weights, and gives them to a matrix instruction.
//
// Which inputs meet in a matrix instruction is free, as long as both operands agree: lane t of four takes the inputs
// that lie behind one another in its 16 bytes of a weight row, so no operand is moved between lanes.
#pragma once

#include <type_traits>

#include "cuda_element.h"
#include "fused_linear.h"

namespace alitok {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTileRows = 16, kTileOutputs = 8;  // of a matrix instruction

// Inputs that one load of a lane brings, those of the four lanes that share an output, and matrix instructions for them.
template <class W>
constexpr int kLaneInputs = 16 / sizeof(W);
template <class W>
constexpr int kChunk = 4 * kLaneInputs<W>;
template <class W>
constexpr int kSteps = kLaneInputs<W> / 4;

__device__ __forceinline__ uint32_t word(const uint4& bits, int i) {
  return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
}

// Where the row of a residual stream lies, before a norm; null for an id that is none of the table's.
__device__ __forceinline__ const float* row_of(const FusedLinearParams& p, int64_t row) {
  const float* x = static_cast<const float*>(p.x);
  if (p.ids == nullptr) return x + row * p.inputs;
  const int64_t id = __ldcg(p.ids + row);
  return id >= 0 && id < p.vocabulary ? x + id * p.inputs : nullptr;
}

// The weights of a load as pairs of T, exactly.
template <class T, class W>
__device__ __forceinline__ void pair_up(const uint4& bits, uint32_t (&pairs)[kLaneInputs<W> / 2]) {
  if constexpr (sizeof(W) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = word(bits, i);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const PackedEight<W> packed = {{word(bits, 2 * half), word(bits, 2 * half + 1)}};
      float value[8];
      if constexpr (std::is_same_v<W, int8_t>) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const uint32_t byte = packed.words[k / 4] >> (8 * (k % 4)) & 0xffu;
          value[k] = __uint_as_float(0x4b000000u | (byte ^ 0x80u)) - 8388736.0f;  // 2^23 + 128 + the number
        }
      } else {
        widen(packed, value);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[4 * half + i] = pack2<T>(value[2 * i], value[2 * i + 1]);
    }
  }
}

}  // namespace
}  // namespace alitok
