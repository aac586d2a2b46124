// For the 9 to 128 rows of a step with a middling batch, on devices with clusters (sm_90 and later). There a block that
// read whole rows would wait longer for them than for its weights. So a cluster of up to 8 blocks shares a tile of
// outputs, and splits the inputs: each block asks for its share of the weights before the kernel ahead has ended, reads its
// share of the rows, and multiplies. Blocks of a cluster read one another's shared memory, twice: for the squares of a row,
// where there is a norm, and for the sums, of which each block adds up an equal part and writes it.
//
// Of the warps of a block four lie side by side along the outputs, and two along the inputs, of which each takes every
// second group of 64. All sums are added in a fixed order: of a warp, the two of a block, the blocks of a cluster.
#include <algorithm>

#include "fused_linear_cuda.h"

namespace alitok {
namespace {

constexpr int kGroup = static_cast<int>(kFusedLinearGroup);
constexpr int kParts = 2;                     // warps that split a block's inputs
constexpr int kSideBySide = kWarps / kParts;  // warps that split its outputs
constexpr int kOwnTiles = 2;                  // of outputs, to a warp: neighbours, or one of each of two matrices
constexpr int kColumns = kSideBySide * kOwnTiles * kTileOutputs;
constexpr int kSumStride = kColumns + 8;  // a lane's pairs of eight rows, without conflicts
constexpr unsigned kMostBlocks = 8;       // of a cluster
constexpr int64_t kWantedBlocks = 100;    // which occupy a device of 100 to 150 multiprocessors, and leave room beside
constexpr int kFew = 16, kMany = 64;      // rows of a block

template <bool kGated>
constexpr int kOutputs = kGated ? kColumns / 2 : kColumns;

// Between rows of inputs in shared memory, in elements, so that the 16 bytes of eight lanes lie in different banks.
template <class W>
constexpr int kRowPadding = sizeof(W) == 1 ? 8 : 32;

// A block's share of the inputs and what lies in its shared memory.
template <class T, class W, int kRows>
struct Share {
  int inputs, stride;  // of the inputs: as many as a block has, and between rows
  __host__ __device__ explicit Share(int groups) : inputs(groups * kGroup), stride(inputs + kRowPadding<W>) {}
  __host__ __device__ size_t sums() const { return kRows * stride * sizeof(T); }  // byte offsets
  __host__ __device__ size_t squares() const { return sums() + kRows * kSumStride * sizeof(float); }
  __host__ __device__ size_t norm_weight() const { return squares() + kRows * sizeof(float); }
  __host__ __device__ size_t bytes() const { return norm_weight() + inputs * sizeof(T); }
};

__device__ __forceinline__ void add(float4& sum, const float4& x) {
  sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}

// Rows of x in shared memory, normalised over all blocks of the cluster and rounded where add_rms_norm rounds: kRowThreads
// threads to a row, which hold their part of it in registers meanwhile. They go to p.stream too, where `copies`.
template <class T, int kRows, int kMost>
__device__ __forceinline__ void normalise_share(const FusedLinearParams& p, int64_t first_row, int64_t first_input,
                                                int rows, int own, bool copies, const T* norm_weight, float* squares,
                                                unsigned blocks, T* tile, int stride) {
  constexpr int kRowThreads = kThreads / kRows, kVectors = kMost / (4 * kRowThreads);
  const int row = threadIdx.x / kRowThreads, place = threadIdx.x % kRowThreads;
  const float* x = row < rows ? row_of(p, first_row + row) : nullptr;
  float4 value[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = 4 * (place + i * kRowThreads);
    value[i] = x != nullptr && at < own ? __ldcg(reinterpret_cast<const float4*>(x + first_input + at)) : float4{};
  }
  if (copies && row < rows) {
    float* stream = p.stream + (first_row + row) * p.inputs + first_input;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = 4 * (place + i * kRowThreads);
      if (at < own) *reinterpret_cast<float4*>(stream + at) = value[i];
    }
  }
  float sum = row < rows && x == nullptr ? NAN : 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const float4 v = value[i];
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
#pragma unroll
  for (int offset = kRowThreads / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (place == 0) squares[row] = sum;
  cluster_sync();
  sum = 0;
  for (unsigned b = 0; b < blocks; ++b) sum += load_from_block(squares + row, b);
  const float inverse = rsqrtf(sum / p.inputs + p.norm_eps);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = 4 * (place + i * kRowThreads);
    if (at >= own) break;
    const uint2 weights = *reinterpret_cast<const uint2*>(norm_weight + at);
    const float2 first = unpack2<T>(weights.x), second = unpack2<T>(weights.y);
    const float4 v = value[i];
    uint2 pairs;
    pairs.x = pack2<T>(rounded<T>(v.x * inverse) * first.x, rounded<T>(v.y * inverse) * first.y);
    pairs.y = pack2<T>(rounded<T>(v.z * inverse) * second.x, rounded<T>(v.w * inverse) * second.y);
    *reinterpret_cast<uint2*>(tile + row * stride + at) = pairs;
  }
}

// A block has up to kRows rows, `groups` groups of inputs, of which a warp has up to kDeep, and a tile of outputs.
template <class T, class W, bool kNorm, bool kGated, int kRows, int kDeep>
__global__ void __launch_bounds__(kThreads, 2)
    fused_linear_sm90_kernel(const FusedLinearParams p, unsigned blocks, int groups) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kMatrices = kGated ? 2 : 1, kTiles = kRows / kTileRows;
  constexpr int kLoads = kGroup / kChunk<W>, kEach = kLaneInputs<W>;  // loads of a lane for a group, and their inputs
  constexpr bool kScaled = sizeof(W) == 1;
  ALITOK_DYNAMIC_SHARED(unsigned char, shared);
  let_next_kernel_begin();
  const Share<T, W, kRows> share(groups);
  T* tile = reinterpret_cast<T*>(shared);                               // (kRows, share.stride)
  float* sums = reinterpret_cast<float*>(shared + share.sums());        // (kRows, kSumStride)
  float* squares = reinterpret_cast<float*>(shared + share.squares());  // (kRows)
  T* norm_weight = reinterpret_cast<T*>(shared + share.norm_weight());  // (share.inputs)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, side = warp % kSideBySide, part = warp / kSideBySide;
  const int group = lane / 4, quarter = lane % 4;  // the row and output of operands, and which of their inputs
  const unsigned rank = cluster_rank();
  const int64_t first_row = int64_t{blockIdx.y} * kRows;
  const int64_t first_output = int64_t{blockIdx.x / blocks} * kOutputs<kGated>;
  const int64_t first_input = static_cast<int64_t>(rank) * share.inputs;
  const int rows = static_cast<int>(min(p.rows - first_row, int64_t{kRows}));
  const int own = static_cast<int>(min(p.inputs - first_input, int64_t{share.inputs}));

  uint4 weights[kDeep][kLoads][kOwnTiles];
  __nv_bfloat16 scales[kDeep][kOwnTiles][2];  // of the outputs whose sums this lane holds
#pragma unroll
  for (int j = 0; j < kOwnTiles; ++j) {
    const bool is_gate = kGated && j == 1;
    const int64_t begin = first_output + (kGated ? side : side * kOwnTiles + j) * kTileOutputs;
    const int64_t output = begin + group, summed = begin + 2 * quarter;
    const W* row = static_cast<const W*>(is_gate ? p.gate : p.weight) + output * p.inputs + first_input;
    const __nv_bfloat16* scale = static_cast<const __nv_bfloat16*>(is_gate ? p.gate_scale : p.scale);
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      const int at = (d * kParts + part) * kGroup;
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        weights[d][l][j] = stream16(row + at + l * kChunk<W> + quarter * kEach, at < own && output < p.outputs);
      }
      if constexpr (kScaled) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scales[d][j][i] = at < own && summed + i < p.outputs
                                ? scale[((summed + i) * p.inputs + first_input + at) / kGroup]
                                : from_float<__nv_bfloat16>(0);
        }
      }
    }
  }
  if constexpr (kNorm) {
    for (int i = 8 * threadIdx.x; i < own; i += 8 * kThreads) {
      cp_async16(norm_weight + i, static_cast<const T*>(p.norm_weight) + first_input + i);
    }
    cp_async_commit();
    cp_async_wait<0>();  // others see it behind the cluster_sync of the norm
  }
  wait_for_kernel_ahead();

  if constexpr (kNorm) {
    constexpr int kMost = kDeep * kParts * kGroup;
    const bool copies = p.ids != nullptr && blockIdx.x < blocks;
    normalise_share<T, kRows, kMost>(p, first_row, first_input, rows, own, copies, norm_weight, squares, blocks, tile,
                                     share.stride);
  } else {
    const T* x = static_cast<const T*>(p.x) + first_row * p.inputs + first_input;
    const int vectors = share.inputs / 8;  // of a row
    for (int i = threadIdx.x; i < kRows * vectors; i += kThreads) {
      const int row = i / vectors, at = i % vectors * 8;
      cp_async16(tile + row * share.stride + at, x + row * p.inputs + at, row < rows && at < own);
    }
    cp_async_commit();
    cp_async_wait<0>();
  }
  __syncthreads();

  float sum[kTiles][kOwnTiles][4] = {};
#pragma unroll
  for (int d = 0; d < kDeep; ++d) {
    const int at = (d * kParts + part) * kGroup;
    if (at >= own) break;
    uint32_t pairs[kLoads][kOwnTiles][kEach / 2];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
#pragma unroll
      for (int j = 0; j < kOwnTiles; ++j) pair_up<T, W>(weights[d][l][j], pairs[l][j]);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t * kTileRows >= rows) break;
      float fresh[kOwnTiles][4] = {};
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        uint32_t operand[2][kEach / 2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const T* inputs =
              tile + (t * kTileRows + half * 8 + group) * share.stride + at + l * kChunk<W> + quarter * kEach;
#pragma unroll
          for (int eight = 0; eight < kEach / 8; ++eight) {
            const uint4 bits = reinterpret_cast<const uint4*>(inputs)[eight];
#pragma unroll
            for (int i = 0; i < 4; ++i) operand[half][eight * 4 + i] = word(bits, i);
          }
        }
#pragma unroll
        for (int step = 0; step < kSteps<W>; ++step) {
          const uint32_t a[4] = {operand[0][2 * step], operand[1][2 * step], operand[0][2 * step + 1],
                                 operand[1][2 * step + 1]};
#pragma unroll
          for (int j = 0; j < kOwnTiles; ++j) {
            const uint32_t b[2] = {pairs[l][j][2 * step], pairs[l][j][2 * step + 1]};
            mma_m16n8k16<T>(kScaled ? fresh[j] : sum[t][j], a, b);
          }
        }
      }
      if constexpr (kScaled) {
#pragma unroll
        for (int j = 0; j < kOwnTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[t][j][i] += fresh[j][i] * to_float(scales[d][j][i % 2]);
        }
      }
    }
  }

  // The results of which this block adds up the sums: four neighbouring outputs of a row at a time.
  constexpr int kRowItems = kOutputs<kGated> / 4, kItems = kRows * kRowItems;
  const int items = (kItems + static_cast<int>(blocks) - 1) / static_cast<int>(blocks);
  const int first_item = static_cast<int>(rank) * items, last_item = min(first_item + items, kItems);
  const auto place_of = [&](int item) {  // -1: there is no such row or output
    const int row = item / kRowItems;
    const int64_t output = first_output + item % kRowItems * 4;
    return item < last_item && row < rows && output < p.outputs ? (first_row + row) * p.outputs + output : int64_t{-1};
  };
  const auto added_to = [&](int item) {
    const int64_t place = place_of(item);
    float4 added{};
    if (place >= 0 && p.bias != nullptr) {
      const T* bias = static_cast<const T*>(p.bias) + first_output + item % kRowItems * 4;
      added = make_float4(to_float(bias[0]), to_float(bias[1]), to_float(bias[2]), to_float(bias[3]));
    }
    if (!kNorm && place >= 0 && p.residual != nullptr) {
      add(added, __ldcg(reinterpret_cast<const float4*>(p.residual + place)));
    }
    return added;
  };
  int item = first_item + threadIdx.x;
  float4 added = added_to(item);  // on its way meanwhile

  const auto for_each_pair = [&](const auto& f) {  // of the sums in registers, and where it belongs
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < kOwnTiles; ++j) {
        const int column = kGated ? j * kOutputs<kGated> + side * kTileOutputs : (side * kOwnTiles + j) * kTileOutputs;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = t * kTileRows + half * 8 + group;
          f(reinterpret_cast<float2*>(sums + row * kSumStride + column + 2 * quarter), sum[t][j][2 * half],
            sum[t][j][2 * half + 1]);
        }
      }
    }
  };
  if (part == 1) for_each_pair([](float2* to, float x, float y) { *to = make_float2(x, y); });
  __syncthreads();
  if (part == 0) for_each_pair([](float2* to, float x, float y) { *to = make_float2(x + to->x, y + to->y); });
  cluster_sync();

  for (; item < last_item; item += kThreads) {
    const int64_t place = place_of(item);
    const float* from = sums + item / kRowItems * kSumStride + item % kRowItems * 4;
    float4 total[kMatrices] = {};
    if (place >= 0) {
      for (unsigned b = 0; b < blocks; ++b) {
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          add(total[m], load_from_block(reinterpret_cast<const float4*>(from + m * kOutputs<kGated>), b));
        }
      }
      add(total[0], added);
      float result[4] = {total[0].x, total[0].y, total[0].z, total[0].w};
      if constexpr (kGated) {  // rounded where the separate layers round
        const float gates[4] = {total[1].x, total[1].y, total[1].z, total[1].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float gate = rounded<T>(gates[i]);
          result[i] = gate / (1.0f + __expf(-gate)) * rounded<T>(result[i]);
        }
      }
      if (!kNorm && p.residual != nullptr) {
        *reinterpret_cast<float4*>(p.residual + place) = make_float4(result[0], result[1], result[2], result[3]);
      } else {
        *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + place) =
            make_uint2(pack2<T>(result[0], result[1]), pack2<T>(result[2], result[3]));
      }
    }
    added = added_to(item + kThreads);
  }
  cluster_sync();  // others have read this block's sums
#endif
}

// So many blocks share the inputs of a tile, each with so many groups: few groups where there are few tiles, and no more
// than its warps hold.
struct Split {
  unsigned blocks;
  int groups;
};

Split split_of(int64_t groups, int64_t tiles, int64_t most_groups) {
  const int64_t least = (groups + most_groups - 1) / most_groups, wanted = (kWantedBlocks + tiles - 1) / tiles;
  const int64_t blocks = std::min<int64_t>(std::max(least, wanted), std::min<int64_t>(groups, kMostBlocks));
  const int64_t each = (groups + blocks - 1) / blocks;
  return {static_cast<unsigned>((groups + each - 1) / each), static_cast<int>(each)};
}

template <class T, class W, bool kNorm, bool kGated, int kRows, int kDeep>
void launch(const FusedLinearParams& p, void* stream) {
  const auto kernel = fused_linear_sm90_kernel<T, W, kNorm, kGated, kRows, kDeep>;
  const int64_t across = (p.outputs + kOutputs<kGated> - 1) / kOutputs<kGated>, down = (p.rows + kRows - 1) / kRows;
  const Split split = split_of(p.inputs / kGroup, across * down, kDeep * kParts);
  const size_t bytes = Share<T, W, kRows>(split.groups).bytes();
  allow_shared_bytes(kernel, bytes);
  const dim3 grid(static_cast<unsigned>(across) * split.blocks, static_cast<unsigned>(down));
  ALITOK_LAUNCH_CLUSTERS(kernel, split.blocks, grid, dim3(kThreads), bytes, stream, p, split.blocks, split.groups);
}

template <class T, class W, int kRows>
void launch_for_layer(const FusedLinearParams& p, void* stream) {
  if (p.norm_weight == nullptr) {
    if (p.inputs <= 2 * kParts * kMostBlocks * kGroup) return launch<T, W, false, false, kRows, 2>(p, stream);
    return launch<T, W, false, false, kRows, 4>(p, stream);
  }
  if (p.gate == nullptr) return launch<T, W, true, false, kRows, 2>(p, stream);
  launch<T, W, true, true, kRows, 2>(p, stream);
}

template <class T, class W>
void launch_for_rows(const FusedLinearParams& p, void* stream) {
  if (p.rows <= kFew) return launch_for_layer<T, W, kFew>(p, stream);
  launch_for_layer<T, W, kMany>(p, stream);
}

static_assert(4 * kParts * kMostBlocks * kGroup == kFusedLinearMostShared);
static_assert(kFusedLinearMostNormed <= 2 * kParts * kMostBlocks * kGroup);

}  // namespace

void fused_linear_sm90(const FusedLinearParams& p, void* stream) {
  if (!has_clusters()) {
    throw std::runtime_error("clusters: expected False on a GPU before compute capability 9.0, got True");
  }
  if (p.dtype == FusedLinearDtype::float16) return launch_for_rows<__half, __half>(p, stream);
  switch (p.weight_dtype) {
    case FusedLinearDtype::int8: return launch_for_rows<__nv_bfloat16, int8_t>(p, stream);
    case FusedLinearDtype::e4m3: return launch_for_rows<__nv_bfloat16, e4m3>(p, stream);
    default: return launch_for_rows<__nv_bfloat16, __nv_bfloat16>(p, stream);
  }
}

}  // namespace alitok
