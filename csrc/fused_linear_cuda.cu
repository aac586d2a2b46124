// For the 2 to 32 rows of a step with a small batch (up to 128 with 8-bit weights), where time goes into latencies and
// into reading the weights. A block owns 8 to 24 outputs, and its warps split their inputs. Each lane asks for its
// weights before anything else, 16 bytes at a time and past the caches, so that they are on their way while the kernel
// ahead still runs; then the block normalises the rows it needs, each block for itself, and multiplies with matrix
// instructions whose m are the rows and whose n are the outputs. Sums of the warps are added in the order of the warps.
//
// Which inputs meet in a matrix instruction is free, as long as both operands agree: lane t of four takes the inputs
// that lie behind one another in its 16 bytes of a weight row, so no operand is moved between lanes.
#include <type_traits>

#include "cuda_element.h"
#include "fused_linear.h"

namespace alitok {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTileRows = 16, kTileOutputs = 8;  // of a matrix instruction
constexpr int kPadding = 32;  // between rows in shared memory, in elements: 64 bytes, for eight rows without conflicts
constexpr int kKept = kFusedLinearMostNormed / (32 * 4);  // groups of four inputs that a lane normalises

// Inputs that one load of a lane brings, those of the four lanes that share an output, and matrix instructions for them.
template <class W>
constexpr int kLaneInputs = 16 / sizeof(W);
template <class W>
constexpr int kChunk = 4 * kLaneInputs<W>;
template <class W>
constexpr int kSteps = kLaneInputs<W> / 4;

// Loads of a lane that are under way at a time, and before the kernel ahead has ended: all of them at the sizes of B.
template <class W, bool kNorm>
constexpr int kDepth = sizeof(W) == 2 ? (kNorm ? 3 : 8) : (kNorm ? 2 : 4);

__device__ __forceinline__ uint32_t word(const uint4& bits, int i) {
  return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
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

// One warp: RMSNorm of a row of x, rounded where add_rms_norm rounds, into shared memory.
template <class T>
__device__ __forceinline__ void normalise(const FusedLinearParams& p, const float* x, T* normed) {
  const int lane = threadIdx.x % 32, inputs = static_cast<int>(p.inputs);
  float4 value[kKept];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int k = 4 * (32 * i + lane);
    value[i] = k < inputs ? __ldcg(reinterpret_cast<const float4*>(x + k)) : make_float4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    squares += value[i].x * value[i].x + value[i].y * value[i].y + value[i].z * value[i].z + value[i].w * value[i].w;
  }
  const float inverse = rsqrtf(warp_sum(squares) / inputs + p.norm_eps);
  const T* weight = static_cast<const T*>(p.norm_weight);
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int k = 4 * (32 * i + lane);
    if (k >= inputs) break;
    const uint2 bits = __ldg(reinterpret_cast<const uint2*>(weight + k));
    const float2 low = unpack2<T>(bits.x), high = unpack2<T>(bits.y);
    uint2 result;
    result.x = pack2<T>(rounded<T>(value[i].x * inverse) * low.x, rounded<T>(value[i].y * inverse) * low.y);
    result.y = pack2<T>(rounded<T>(value[i].z * inverse) * high.x, rounded<T>(value[i].w * inverse) * high.y);
    *reinterpret_cast<uint2*>(normed + k) = result;
  }
}

template <class T, class W, bool kNorm, bool kGated, int kColumns, int kRows>
__global__ void __launch_bounds__(kThreads, kNorm && kRows > kTileRows ? 1 : 2)
    fused_linear_kernel(const FusedLinearParams p) {
  constexpr int kTiles = (kRows + kTileRows - 1) / kTileRows, kHalves = kRows > kTileRows / 2 ? 2 : 1;
  constexpr int kMatrices = kGated ? 2 : 1;
  constexpr int kDeep = kDepth<W, kNorm>;
  constexpr bool kScaled = sizeof(W) == 1;
  ALITOK_DYNAMIC_SHARED(unsigned char, shared);  // the normalised rows, then the sums of the warps
  let_next_kernel_begin();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, quarter = lane % 4;  // the row and output of operands, and which of their inputs
  const int64_t first_row = int64_t{blockIdx.y} * kRows;
  const int64_t first_output = int64_t{blockIdx.x} * (kColumns * kTileOutputs);
  const int rows = static_cast<int>(min(p.rows - first_row, int64_t{kRows}));
  const int chunks = static_cast<int>(p.inputs / kChunk<W>);

  uint4 weights[kDeep][kColumns][kMatrices];
  __nv_bfloat16 scales[kScaled ? kDeep : 1][kColumns][kMatrices][2];  // of the outputs whose sums this lane holds
  const auto fetch = [&](int first) {                                 // of chunks first, first + kWarps, ...
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      const int chunk = first + d * kWarps;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int64_t output = first_output + c * kTileOutputs + group;
        const int64_t at = output * p.inputs + chunk * kChunk<W> + quarter * kLaneInputs<W>;
        const bool exists = chunk < chunks && output < p.outputs;
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          const W* matrix = static_cast<const W*>(m == 0 ? p.weight : p.gate);
          weights[d][c][m] = exists ? stream16(matrix + at) : make_uint4(0, 0, 0, 0);
          if constexpr (kScaled) {
            const __nv_bfloat16* scale = static_cast<const __nv_bfloat16*>(m == 0 ? p.scale : p.gate_scale);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int64_t summed = first_output + c * kTileOutputs + 2 * quarter + i;
              const bool there = chunk < chunks && summed < p.outputs;
              scales[d][c][m][i] = there ? scale[summed * chunks + chunk] : from_float<__nv_bfloat16>(0);
            }
          }
        }
      }
    }
  };
  fetch(warp);

  // The results of this thread, each of a row and an output of the block, and what is added to them.
  constexpr int kTile = kHalves * 8 * kTileOutputs, kSums = kTiles * kColumns * kMatrices;
  constexpr int kResults = kTiles * kColumns * kTile, kOwn = (kResults + kThreads - 1) / kThreads;
  const auto row_of = [](int i) { return i / (kColumns * kTile) * kTileRows + i % kTile / kTileOutputs; };
  const auto output_of = [&](int i) { return first_output + i / kTile % kColumns * kTileOutputs + i % kTileOutputs; };
  float added[kOwn] = {};
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int64_t output = output_of(own * kThreads + threadIdx.x);
    if (p.bias != nullptr && output < p.outputs) added[own] = to_float(static_cast<const T*>(p.bias)[output]);
  }
  wait_for_kernel_ahead();
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int i = own * kThreads + threadIdx.x, row = row_of(i);
    const int64_t output = output_of(i);
    if (p.residual == nullptr || i >= kResults || row >= rows || output >= p.outputs) continue;
    added[own] += __ldcg(p.residual + (first_row + row) * p.outputs + output);
  }

  float* partial = reinterpret_cast<float*>(shared);  // (kWarps, kSums, kTile)
  T* normed = reinterpret_cast<T*>(shared);           // (kRows, stride)
  const int64_t stride = kNorm ? p.inputs + kPadding : p.inputs;
  if constexpr (kNorm) {
    for (int row = warp; row < rows; row += kWarps) {
      normalise(p, static_cast<const float*>(p.x) + (first_row + row) * p.inputs, normed + row * stride);
    }
    __syncthreads();
  }
  const T* x = kNorm ? normed : static_cast<const T*>(p.x) + first_row * p.inputs;
  const auto operand = [&](int row, int64_t k) {  // eight inputs of a row
    if constexpr (kNorm) {
      return *reinterpret_cast<const uint4*>(x + row * stride +
                                             k);  // rows that are none hold anything: so do their sums
    } else {
      return row < rows ? __ldcg(reinterpret_cast<const uint4*>(x + row * stride + k)) : make_uint4(0, 0, 0, 0);
    }
  };

  float sums[kTiles][kColumns][kMatrices][4] = {};
  for (int first = warp; first < chunks; first += kDeep * kWarps) {
    if (first != warp) fetch(first);
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      const int chunk = first + d * kWarps;
      if (chunk >= chunks) break;
      uint32_t inputs[kTiles][2][kLaneInputs<W> / 2] = {};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
          for (int part = 0; part < kLaneInputs<W> / 8; ++part) {
            const int64_t k = chunk * kChunk<W> + quarter * kLaneInputs<W> + part * 8;
            const uint4 bits = operand(tile * kTileRows + half * (kTileRows / 2) + group, k);
#pragma unroll
            for (int i = 0; i < 4; ++i) inputs[tile][half][part * 4 + i] = word(bits, i);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          uint32_t pairs[kLaneInputs<W> / 2];
          pair_up<T, W>(weights[d][c][m], pairs);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            float fresh[4] = {};
            float (&sum)[4] = sums[tile][c][m];
#pragma unroll
            for (int step = 0; step < kSteps<W>; ++step) {
              const uint32_t a[4] = {inputs[tile][0][2 * step], inputs[tile][1][2 * step],
                                     inputs[tile][0][2 * step + 1], inputs[tile][1][2 * step + 1]};
              const uint32_t b[2] = {pairs[2 * step], pairs[2 * step + 1]};
              mma_m16n8k16<T>(kScaled ? fresh : sum, a, b);
            }
            if constexpr (kScaled) {
#pragma unroll
              for (int i = 0; i < 4; ++i) sum[i] += fresh[i] * to_float(scales[d][c][m][i % 2]);
            }
          }
        }
      }
    }
  }

  if constexpr (kNorm) __syncthreads();  // the normalised rows have been read
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        float* mine = partial + (warp * kSums + (tile * kColumns + c) * kMatrices + m) * kTile;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          *reinterpret_cast<float2*>(mine + (half * 8 + group) * kTileOutputs + 2 * quarter) =
              make_float2(sums[tile][c][m][2 * half], sums[tile][c][m][2 * half + 1]);
        }
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int i = own * kThreads + threadIdx.x, row = row_of(i);
    const int64_t output = output_of(i);
    if (i >= kResults || row >= rows || output >= p.outputs) continue;
    float total[kMatrices] = {};
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total[m] += partial[(w * kSums + i / kTile * kMatrices + m) * kTile + i % kTile];
    }
    float result = total[0] + added[own];
    if constexpr (kGated) {
      // Rounded where the separate layers round.
      const float gate = rounded<T>(total[1]);
      result = gate / (1.0f + __expf(-gate)) * rounded<T>(result);
    }
    const int64_t at = (first_row + row) * p.outputs + output;
    if (p.residual != nullptr) {
      p.residual[at] = result;
    } else {
      static_cast<T*>(p.out)[at] = from_float<T>(result);
    }
  }
}

template <class T, class W, bool kNorm, bool kGated, int kColumns, int kRows>
void launch(const FusedLinearParams& p, void* stream) {
  const auto kernel = fused_linear_kernel<T, W, kNorm, kGated, kColumns, kRows>;
  const size_t normed = kNorm ? kRows * (p.inputs + kPadding) * sizeof(T) : 0;
  const size_t sums = kWarps * kRows * kColumns * kTileOutputs * (kGated ? 2 : 1) * sizeof(float);
  const size_t bytes = normed > sums ? normed : sums;
  allow_shared_bytes(kernel, bytes);
  constexpr int64_t kOwned = kColumns * kTileOutputs;
  const dim3 grid(static_cast<unsigned>((p.outputs + kOwned - 1) / kOwned),
                  static_cast<unsigned>((p.rows + kRows - 1) / kRows));
  ALITOK_LAUNCH_EARLY(kernel, grid, dim3(kThreads), bytes, stream, p);
}

// As many outputs to a block as make about 100 blocks at the sizes of B: a block of the kernel behind then fits beside
// each, and has its weights on their way.
template <class T, class W, int kRows>
void launch_for_layer(const FusedLinearParams& p, void* stream) {
  if (p.norm_weight == nullptr) return launch<T, W, false, false, 1, kRows>(p, stream);
  if (p.gate == nullptr) return launch<T, W, true, false, 3, kRows>(p, stream);
  launch<T, W, true, true, 2, kRows>(p, stream);
}

template <class T, class W>
void launch_for_rows(const FusedLinearParams& p, void* stream) {
  if (p.rows <= 8) return launch_for_layer<T, W, 8>(p, stream);
  if (p.rows <= 16) return launch_for_layer<T, W, 16>(p, stream);
  launch_for_layer<T, W, 32>(p, stream);
}

}  // namespace

void fused_linear_cuda(const FusedLinearParams& p, void* stream) {
  if (p.dtype == FusedLinearDtype::float16) return launch_for_rows<__half, __half>(p, stream);
  switch (p.weight_dtype) {
    case FusedLinearDtype::int8: return launch_for_rows<__nv_bfloat16, int8_t>(p, stream);
    case FusedLinearDtype::e4m3: return launch_for_rows<__nv_bfloat16, e4m3>(p, stream);
    default: return launch_for_rows<__nv_bfloat16, __nv_bfloat16>(p, stream);
  }
}

}  // namespace alitok
