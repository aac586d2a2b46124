// For the 2 to 32 rows of a step with a small batch (up to 128 with 8-bit weights), where time goes into latencies and
// into reading the weights. A block owns 8 to 24 outputs, and its warps split their inputs. Each lane asks for its
// weights before anything else, 16 bytes at a time and past the caches, so that they are on their way while the kernel
// ahead still runs; then the block normalises the rows it needs, each block for itself, and multiplies with matrix
// instructions whose m are the rows and whose n are the outputs. Sums of the warps are added in the order of the warps.
//
// Which inputs meet in a matrix instruction is free, as long as both operands agree: lane t of four takes the inputs
// that lie behind one another in its 16 bytes of a weight row, so no operand is moved between lanes.
#include <algorithm>

#include "fused_linear_cuda.h"

namespace alitok {
namespace {

constexpr int kPadding = 32;  // between rows in shared memory, in elements: 64 bytes, for eight rows without conflicts

// Loads that bring the longest rows that are normalised.
template <class W>
constexpr int kDeepest = (kFusedLinearMostNormed + kWarps * kChunk<W> - 1) / (kWarps * kChunk<W>);

// The most at a time of rows that are not: longer ones take turns.
template <class W>
constexpr int kDeepestPlain = sizeof(W) == 1 ? 4 : 8;

// Tiles of outputs to a block: as many as make about 100 blocks at the sizes of B, so that a block of the kernel behind
// fits beside each, and has its weights on their way. Of two matrices with the longest rows of 8-bit weights, a lane has
// registers for one.
template <class W, bool kNorm, bool kGated, int kDeep>
constexpr int kOwnedTiles = !kNorm                                   ? 1
                            : !kGated                                ? 3
                            : sizeof(W) == 1 && kDeep == kDeepest<W> ? 1
                                                                     : 2;

// kTeam warps: RMSNorm of a row of x of up to kMost inputs, if it exists, rounded where add_rms_norm rounds; weights and
// result in shared memory. x null: NaN. The row goes to `stream` too, unless that is null. Where kTeam > 1 the whole block
// comes here, once.
template <int kTeam, int kMost, class T>
__device__ __forceinline__ void normalise(const float* x, bool exists, const T* weight, float eps, int inputs,
                                          T* normed, float* stream) {
  constexpr int kVector = kTeam == 1 ? 4 : 2, kStep = 32 * kTeam * kVector;
  constexpr int kSteps = kMost / kStep;
  using Values = std::conditional_t<kVector == 4, float4, float2>;
  using Pairs = std::conditional_t<kVector == 4, uint2, uint32_t>;
  const int first = threadIdx.x % (32 * kTeam) * kVector;
  float value[kSteps][kVector];
  uint32_t weights[kSteps][kVector / 2];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const Values values = x != nullptr && first + i * kStep < inputs
                              ? __ldcg(reinterpret_cast<const Values*>(x + first + i * kStep))
                              : Values{};
    memcpy(value[i], &values, sizeof(values));
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const Pairs pairs =
        first + i * kStep < inputs ? *reinterpret_cast<const Pairs*>(weight + first + i * kStep) : Pairs{};
    memcpy(weights[i], &pairs, sizeof(pairs));
  }
  if (stream != nullptr && exists) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (first + i * kStep < inputs) memcpy(stream + first + i * kStep, value[i], sizeof(value[i]));
    }
  }
  float squares = exists && x == nullptr ? NAN : 0.0f;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) squares += value[i][v] * value[i][v];
  }
  squares = warp_sum(squares);
  if constexpr (kTeam > 1) {
    __shared__ float scratch[kWarps];
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) scratch[warp] = squares;
    __syncthreads();
    squares = 0;
#pragma unroll
    for (int w = 0; w < kTeam; ++w) squares += scratch[warp / kTeam * kTeam + w];
  }
  const float inverse = rsqrtf(squares / inputs + eps);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (!exists || first + i * kStep >= inputs) break;
    uint32_t result[kVector / 2];
#pragma unroll
    for (int v = 0; v < kVector; v += 2) {
      const float2 pair = unpack2<T>(weights[i][v / 2]);
      result[v / 2] =
          pack2<T>(rounded<T>(value[i][v] * inverse) * pair.x, rounded<T>(value[i][v + 1] * inverse) * pair.y);
    }
    memcpy(normed + first + i * kStep, result, sizeof(result));
  }
}

// Up to kRows rows to a block; kDeep loads of weights are under way to a lane, for each of its outputs and matrices.
template <class T, class W, bool kNorm, bool kGated, int kRows, int kDeep>
__global__ void __launch_bounds__(kThreads, kRows > kTileRows || kDeep == kDeepest<W> || sizeof(W) == 1 ? 1 : 2)
    fused_linear_kernel(const FusedLinearParams p) {
  constexpr int kColumns = kOwnedTiles<W, kNorm, kGated, kDeep>, kMatrices = kGated ? 2 : 1;
  constexpr int kTiles = (kRows + kTileRows - 1) / kTileRows, kHalves = kRows > kTileRows / 2 ? 2 : 1;
  constexpr int kEach = kLaneInputs<W>, kStride = kWarps * kChunk<W>;  // from one load of a lane to the next
  constexpr bool kScaled = sizeof(W) == 1, kOnce = kNorm || kDeep < kDeepestPlain<W>;  // all inputs with one fetch
  ALITOK_DYNAMIC_SHARED(unsigned char, shared);  // weights of the norm and normalised rows, then the warps' sums
  let_next_kernel_begin();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, quarter = lane % 4;  // the row and output of operands, and which of their inputs
  const int64_t first_row = int64_t{blockIdx.y} * kRows;
  const int64_t first_output = int64_t{blockIdx.x} * (kColumns * kTileOutputs);
  const int rows = static_cast<int>(min(p.rows - first_row, int64_t{kRows}));
  const int inputs = static_cast<int>(p.inputs), chunks = inputs / kChunk<W>;
  const int begin = warp * kChunk<W> + quarter * kEach;  // the first input of this lane

  uint4 weights[kDeep][kColumns][kMatrices];
  __nv_bfloat16 scales[kScaled ? kDeep : 1][kColumns][kMatrices][2];  // of the outputs whose sums this lane holds
  const auto fetch = [&](int first) {                                 // from input `first` of this lane on
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t output = first_output + c * kTileOutputs + group, summed = output - group + 2 * quarter;
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        const W* row = static_cast<const W*>(m == 0 ? p.weight : p.gate) + output * inputs + first;
        const __nv_bfloat16* scale = static_cast<const __nv_bfloat16*>(m == 0 ? p.scale : p.gate_scale);
#pragma unroll
        for (int d = 0; d < kDeep; ++d) {
          const bool there = first + d * kStride < inputs;
          weights[d][c][m] = stream16(row + d * kStride, there && output < p.outputs);
          if constexpr (kScaled) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              scales[d][c][m][i] = there && summed + i < p.outputs
                                       ? scale[(summed + i) * chunks + first / kChunk<W> + d * kWarps]
                                       : from_float<__nv_bfloat16>(0);
            }
          }
        }
      }
    }
  };
  fetch(begin);
  float* partial = reinterpret_cast<float*>(shared);  // (kWarps, kSums, kTile)
  T* norm_weight = reinterpret_cast<T*>(shared);      // (inputs)
  T* normed = norm_weight + inputs;                   // (kRows, stride)
  if constexpr (kNorm) {
#pragma unroll 1
    for (int i = 8 * threadIdx.x; i < inputs; i += 8 * kThreads) {
      cp_async16(norm_weight + i, static_cast<const T*>(p.norm_weight) + i);
    }
    cp_async_commit();
  }

  // The results of this thread, each of a row and an output of the block: where it belongs, and what is added to it.
  constexpr int kTile = kHalves * 8 * kTileOutputs, kSums = kTiles * kColumns * kMatrices;
  constexpr int kResults = kTiles * kColumns * kTile, kOwn = (kResults + kThreads - 1) / kThreads;
  int64_t place[kOwn];  // -1: there is no such row or output
  float added[kOwn] = {};
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int i = own * kThreads + threadIdx.x;
    const int row = i / (kColumns * kTile) * kTileRows + i % kTile / kTileOutputs;
    const int64_t output = first_output + i / kTile % kColumns * kTileOutputs + i % kTileOutputs;
    const bool exists = i < kResults && row < rows && output < p.outputs;
    place[own] = exists ? (first_row + row) * p.outputs + output : -1;
    if (exists && p.bias != nullptr) added[own] = to_float(static_cast<const T*>(p.bias)[output]);
  }
  if constexpr (kNorm) {
    cp_async_wait<0>();
    __syncthreads();
  }
  wait_for_kernel_ahead();
  if constexpr (!kNorm) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      if (p.residual != nullptr && place[own] >= 0) added[own] += __ldcg(p.residual + place[own]);
    }
  }

  const int stride = kNorm ? inputs + kPadding : inputs;
  if constexpr (kNorm) {
    constexpr int kTeam = kRows < kWarps ? kWarps / kRows : 1;
    constexpr int kMost = std::min<int64_t>(kDeep * kStride, kFusedLinearMostNormed);
    for (int row = warp / kTeam; row < kRows; row += kWarps / kTeam) {
      if (kTeam == 1 && row >= rows) break;
      const float* x = row < rows ? row_of(p, first_row + row) : nullptr;
      float* stream = p.ids == nullptr || blockIdx.x > 0 ? nullptr : p.stream + (first_row + row) * inputs;
      normalise<kTeam, kMost>(x, row < rows, norm_weight, p.norm_eps, inputs, normed + row * stride, stream);
    }
    __syncthreads();
  }
  const T* x = kNorm ? normed : static_cast<const T*>(p.x) + first_row * inputs;

  // Loads of inputs that a lane holds at a time: as many as fit in 32 registers, all of them before the first use. The
  // products of one sum go to several, where there are few of them, so that they need not wait for one another.
  constexpr int kFit = 64 / (kTiles * kHalves * kEach), kHeld = kFit < kDeep ? kFit : kDeep;
  constexpr int kChains = kScaled || kSums > 2 ? 1 : 4 / kSums;
  float sums[kTiles][kColumns][kMatrices][kChains][4] = {};
  for (int first = begin; first - quarter * kEach < inputs; first += kOnce ? inputs : kDeep * kStride) {
    if (!kOnce && first != begin) fetch(first);
#pragma unroll
    for (int held = 0; held < kDeep; held += kHeld) {
      uint32_t operand[kHeld][kTiles][2][kEach / 2] = {};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const int row = tile * kTileRows + half * (kTileRows / 2) + group;
          // Beyond kRows there is no memory; between the rows that exist and kRows it is anybody's, and so are the sums.
          const bool readable = kNorm ? row < kRows : row < rows;
          const T* lane_inputs = x + row * stride + first;
#pragma unroll
          for (int d = held; d < held + kHeld && d < kDeep; ++d) {
            if (!readable || first + d * kStride >= inputs) continue;
#pragma unroll
            for (int part = 0; part < kEach / 8; ++part) {
              const uint4* eight = reinterpret_cast<const uint4*>(lane_inputs + d * kStride + part * 8);
              const uint4 bits = kNorm ? *eight : __ldcg(eight);
#pragma unroll
              for (int i = 0; i < 4; ++i) operand[d - held][tile][half][part * 4 + i] = word(bits, i);
            }
          }
        }
      }
#pragma unroll
      for (int d = held; d < held + kHeld && d < kDeep; ++d) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
#pragma unroll
          for (int m = 0; m < kMatrices; ++m) {
            uint32_t pairs[kEach / 2];
            pair_up<T, W>(weights[d][c][m], pairs);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              const auto& of_rows = operand[d - held][tile];
              float fresh[4] = {};
#pragma unroll
              for (int step = 0; step < kSteps<W>; ++step) {
                const uint32_t a[4] = {of_rows[0][2 * step], of_rows[1][2 * step], of_rows[0][2 * step + 1],
                                       of_rows[1][2 * step + 1]};
                const uint32_t b[2] = {pairs[2 * step], pairs[2 * step + 1]};
                mma_m16n8k16<T>(kScaled ? fresh : sums[tile][c][m][(d * kSteps<W> + step) % kChains], a, b);
              }
              if constexpr (kScaled) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[tile][c][m][0][i] += fresh[i] * to_float(scales[d][c][m][i % 2]);
              }
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
        float (&sum)[kChains][4] = sums[tile][c][m];
#pragma unroll
        for (int chain = 1; chain < kChains; ++chain) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[0][i] += sum[chain][i];
        }
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          *reinterpret_cast<float2*>(mine + (half * 8 + group) * kTileOutputs + 2 * quarter) =
              make_float2(sum[0][2 * half], sum[0][2 * half + 1]);
        }
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    if (place[own] < 0) continue;
    const int i = own * kThreads + threadIdx.x;
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
    if (!kNorm && p.residual != nullptr) {
      p.residual[place[own]] = result;
    } else {
      static_cast<T*>(p.out)[place[own]] = from_float<T>(result);
    }
  }
}

template <class T, class W, bool kNorm, bool kGated, int kRows, int kDeep>
void launch(const FusedLinearParams& p, void* stream) {
  const auto kernel = fused_linear_kernel<T, W, kNorm, kGated, kRows, kDeep>;
  constexpr int64_t kOwned = kOwnedTiles<W, kNorm, kGated, kDeep> * kTileOutputs;
  constexpr size_t kSummed = kRows < 8 ? 8 : kRows;
  const size_t normed = kNorm ? (p.inputs + kRows * (p.inputs + kPadding)) * sizeof(T) : 0;
  const size_t sums = kWarps * kSummed * kOwned * (kGated ? 2 : 1) * sizeof(float);
  const size_t bytes = normed > sums ? normed : sums;
  allow_shared_bytes(kernel, bytes);
  const dim3 grid(static_cast<unsigned>((p.outputs + kOwned - 1) / kOwned),
                  static_cast<unsigned>((p.rows + kRows - 1) / kRows));
  ALITOK_LAUNCH_EARLY(kernel, grid, dim3(kThreads), bytes, stream, p);
}

// As deep as the inputs, so that all weights are on their way before the kernel ahead has ended; the longest rows take
// more than one turn.
template <class T, class W, int kRows>
void launch_for_layer(const FusedLinearParams& p, void* stream) {
  const int64_t loads = (p.inputs + kWarps * kChunk<W> - 1) / (kWarps * kChunk<W>);
  if (p.norm_weight == nullptr) {
    constexpr int kMost = kDeepestPlain<W>, kSummed = kRows < 8 ? 8 : kRows;
    if (loads <= kMost / 2) return launch<T, W, false, false, kSummed, kMost / 2>(p, stream);
    return launch<T, W, false, false, kSummed, kMost>(p, stream);
  }
  constexpr int kMost = kDeepest<W>, kLess = (kMost + 1) / 2;
  if (p.gate == nullptr) {
    if (loads <= kLess) return launch<T, W, true, false, kRows, kLess>(p, stream);
    return launch<T, W, true, false, kRows, kMost>(p, stream);
  }
  if (loads <= kLess) return launch<T, W, true, true, kRows, kLess>(p, stream);
  launch<T, W, true, true, kRows, kMost>(p, stream);
}

template <class T, class W>
void launch_for_rows(const FusedLinearParams& p, void* stream) {
  if (p.rows <= 2) return launch_for_layer<T, W, 2>(p, stream);
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
