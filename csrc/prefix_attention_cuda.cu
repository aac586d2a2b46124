// Forward: online softmax over key tiles (Milakov and Gimelshein 2018; Dao 2023, "FlashAttention-2"). A block holds one
// head's rows q_first .. q_first + kRows, a warp 16 kRowTiles of them; key and value tiles arrive by cp.async, double
// buffered, with one barrier a tile. Norm and rotary table are applied to a key tile in shared memory by the threads
// that copied it: each block repeats that for its keys, which costs less than a pass over qkv through global memory.
#include "prefix_attention_cuda.h"

namespace alitok {
namespace {

template <class T, int kDim>
struct ForwardShape {
  static constexpr bool kWide = kDim > 80;
  static constexpr int kWarps = kWide && sizeof(T) == 2 ? 8 : 4;
  static constexpr int kRowTiles = kWide || sizeof(T) == 4 ? 1 : 2;  // 16-row tiles of a warp: each fragment of keys
                                                                     // and values is used that often
  static constexpr int kKeys = sizeof(T) == 2 ? 64 : 32;             // a tile
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps * kRowTiles;
  static constexpr int kStages = 2;
  using Row = SharedRow<T, kDim, kThreads / kKeys>;

  struct Shared {
    alignas(16) T q[kRows][kStride<T, kDim>];
    alignas(16) T k[kStages][kKeys][kStride<T, kDim>];
    alignas(16) T v[kStages][kKeys][kStride<T, kDim>];
    float q_weight[kDim], k_weight[kDim];
    alignas(16) uint8_t keep[kRows][16];  // dropout: bits by 16-key part of the current 128 keys
  };
};

template <class T, int kDim, int kCount, class Shape>
__device__ __forceinline__ void load_rows(T (*tile)[kStride<T, kDim>], const Rows<T>& rows, int first) {
  using Row = typename Shape::Row;
#pragma unroll
  for (int r = 0; r < kCount; r += Shape::kKeys) {
#pragma unroll 1  // as in load_tile
    for (int i = 0; i < Row::kChunks; ++i) {
      copy_chunk(&tile[r + Row::row()][Row::column(i)], rows, first + r + Row::row(), Row::column(i));
    }
  }
}

template <class T, int kDim, int kCount, class Shape>
__device__ __forceinline__ void prepare_rows(const PrefixAttentionParams& p, T (*tile)[kStride<T, kDim>],
                                             const float* weight, int first) {
  using Row = typename Shape::Row;
#pragma unroll
  for (int r = 0; r < kCount; r += Shape::kKeys) {
    Row row;
    row.read(tile[r + Row::row()]);
    row.prepare(p, weight, first + r + Row::row());
    row.write(tile[r + Row::row()], kDim);
  }
}

// Rows g and g + 8 of a lane in one 16-row tile.
struct SoftmaxState {
  float maximum[2], sum[2];  // of base-2 logits; the sum over this lane's columns only
};

// Logits to probabilities relative to the running maximum; rescales what was summed before.
template <int kOutTiles, int kTiles>
__device__ __forceinline__ void softmax_step(SoftmaxState& state, float (&out)[kOutTiles][4], float (&s)[kTiles][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float maximum = state.maximum[half];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) maximum = fmaxf(maximum, s[n][e]);
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
    const float correction = exp2_fast(state.maximum[half] - maximum);
    state.maximum[half] = maximum;
    float sum = state.sum[half] * correction;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[n][e] = exp2_fast(s[n][e] - maximum);
        sum += s[n][e];
      }
    }
    state.sum[half] = sum;
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
      out[n][2 * half] *= correction;
      out[n][2 * half + 1] *= correction;
    }
  }
}

// Products to logits, in base 2.
template <int kTiles>
__device__ __forceinline__ void scale_logits(float (&s)[kTiles][4], float scale_log2) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] *= scale_log2;
  }
}

// Logits of rows `row` and row + 8 beyond what they see, in a lane's columns 8 n + first and the next, become -inf. Not
// before they are scaled: a scale below zero would turn -inf into inf, zero into NaN.
template <int kTiles>
__device__ __forceinline__ void hide(const PrefixAttentionParams& p, float (&s)[kTiles][4], int row, int first) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int end = visible_end(p, row + 8 * half) - first;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (8 * n >= end) s[n][2 * half] = -INFINITY;
      if (8 * n + 1 >= end) s[n][2 * half + 1] = -INFINITY;
    }
  }
}

// `keep` points to the bits of the lane's row and first column; the second row's lie 8 rows below. `part` is the tile's
// first 16-key part of its 128 keys.
template <int kTiles>
__device__ __forceinline__ void drop(float (&s)[kTiles][4], const uint8_t* keep, int part) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const unsigned bits = keep[8 * half * 16 + n % 2 * 8 + e];
        if ((bits >> (part + n / 2) & 1) == 0) s[n][2 * half + e] = 0.0f;
      }
    }
  }
}

template <class T, int kDim>
__global__ __launch_bounds__(ForwardShape<T, kDim>::kThreads) void forward_kernel(const PrefixAttentionParams p) {
  using Shape = ForwardShape<T, kDim>;
  constexpr int kKeys = Shape::kKeys, kRowTiles = Shape::kRowTiles, kTiles = kKeys / 8;
  ALITOK_DYNAMIC_SHARED(typename Shape::Shared, shared);

  const int length = static_cast<int>(p.length), prefix = static_cast<int>(p.prefix_len);
  const int64_t bh = blockIdx.x, b = bh / p.heads, h = bh % p.heads;
  const int q_first = static_cast<int>(gridDim.y - 1 - blockIdx.y) * Shape::kRows;  // the longest rows start first
  const int key_end = visible_end(p, min(q_first + Shape::kRows, length) - 1);
  const Rows<T> q_rows = rows_of<T>(p, b, h, 0), k_rows = rows_of<T>(p, b, h, 1), v_rows = rows_of<T>(p, b, h, 2);
  const bool normed = p.q_norm_weight != nullptr, prepared = normed || p.rope != nullptr;
  const float* q_weight = normed ? shared->q_weight : nullptr;
  const float* k_weight = normed ? shared->k_weight : nullptr;
  const uint64_t seed = p.dropout.threshold != 0 ? static_cast<uint64_t>(*p.dropout.seed) : 0;

  load_rows<T, kDim, Shape::kRows, Shape>(shared->q, q_rows, q_first);
  load_rows<T, kDim, kKeys, Shape>(shared->k[0], k_rows, 0);
  load_tile<T, kDim, Shape::kThreads, kKeys>(shared->v[0][0], v_rows, 0);
  cp_async_commit();
  if (normed) {
    load_weight<T, kDim>(shared->q_weight, p.q_norm_weight, p.head_dim);
    load_weight<T, kDim>(shared->k_weight, p.k_norm_weight, p.head_dim);
    __syncthreads();
  }
  cp_async_wait<0>();
  if (prepared) {
    prepare_rows<T, kDim, Shape::kRows, Shape>(p, shared->q, q_weight, q_first);
    prepare_rows<T, kDim, kKeys, Shape>(p, shared->k[0], k_weight, 0);
  }

  const int warp_row = warp_index() * 16 * kRowTiles, g = lane_index() / 4, t = lane_index() % 4;
  const int warp_first = q_first + warp_row, warp_last = warp_first + 16 * kRowTiles - 1;
  const float scale_log2 = p.scale * kLog2e;
  SoftmaxState state[kRowTiles];
  float out[kRowTiles][kDim / 8][4] = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) state[m] = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};

  for (int first = 0, stage = 0; first < key_end; first += kKeys, stage ^= 1) {
    __syncthreads();  // this tile is complete for all, and nobody reads the other stage any more
    const int next = first + kKeys;
    if (next < key_end) {
      load_rows<T, kDim, kKeys, Shape>(shared->k[stage ^ 1], k_rows, next);
      load_tile<T, kDim, Shape::kThreads, kKeys>(shared->v[stage ^ 1][0], v_rows, next);
      cp_async_commit();
    }
    if (p.dropout.threshold != 0 && first % 128 == 0) {  // a warp makes and reads its own rows' bits
      __syncwarp();
      const int rows = min(16 * kRowTiles, length - warp_first);  // below zero where the warp has none
      for (int i = lane_index(); i < 16 * rows; i += 32) {
        const int row = warp_row + i / 16;
        shared->keep[row][i % 16] = static_cast<uint8_t>(keep_bits(p, seed, bh, q_first + row, first / 128, i % 16));
      }
      __syncwarp();
    }
    if (warp_first < length && (first < prefix || first <= warp_last)) {
      const bool whole = next <= length && (next <= prefix || next - 1 <= warp_first);
      float s[kRowTiles][kTiles][4] = {};
      multiply_rows<T, kDim>(s, shared->q[warp_row], shared->k[stage][0]);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const int row = warp_row + 16 * m + g;
        scale_logits<kTiles>(s[m], scale_log2);
        if (!whole) hide<kTiles>(p, s[m], q_first + row, first + 2 * t);
        softmax_step(state[m], out[m], s[m]);
        if (p.dropout.threshold != 0) drop<kTiles>(s[m], shared->keep[row] + 2 * t, first % 128 / 16);
      }
      multiply_columns<T, kDim>(out, s, shared->v[stage][0]);
    }
    if (next < key_end) {
      cp_async_wait<0>();
      if (prepared) prepare_rows<T, kDim, kKeys, Shape>(p, shared->k[stage ^ 1], k_weight, next);
    }
  }

  // Through this warp's rows of the query tile, for whole-chunk stores.
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + g + 8 * half;
      float sum = state[m].sum[half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const float factor = (p.dropout.threshold != 0 ? p.dropout.scale : 1.0f) / sum;
      if (t == 0 && q_first + row < length) {
        p.lse[bh * p.length + q_first + row] = state[m].maximum[half] * kLn2 + logf(sum);
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        shared->q[row][8 * n + 2 * t] = static_cast<T>(out[m][n][2 * half] * factor);
        shared->q[row][8 * n + 2 * t + 1] = static_cast<T>(out[m][n][2 * half + 1] * factor);
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kDim / kVector<T>;
  for (int i = lane_index(); i < 16 * kRowTiles * kChunks; i += 32) {
    const int row = warp_row + i / kChunks, column = i % kChunks * kVector<T>;
    if (q_first + row < length && column < p.head_dim) {
      T* to = static_cast<T*>(p.out) + ((b * p.length + q_first + row) * p.heads + h) * p.head_dim + column;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&shared->q[row][column]);
    }
  }
}

struct ForwardLauncher {
  const PrefixAttentionParams& p;
  void* stream;

  template <class T, int kDim>
  void run() const {
    using Shape = ForwardShape<T, kDim>;
    const dim3 grid(static_cast<unsigned>(p.batch * p.heads),
                    static_cast<unsigned>((p.length + Shape::kRows - 1) / Shape::kRows));
    allow_shared_bytes(forward_kernel<T, kDim>, sizeof(typename Shape::Shared));
    ALITOK_LAUNCH((forward_kernel<T, kDim>), grid, Shape::kThreads, sizeof(typename Shape::Shared), stream, p);
  }
};

}  // namespace

int64_t prefix_attention_workspace_cuda(const PrefixAttentionParams&) { return 0; }

void prefix_attention_cuda(const PrefixAttentionParams& p, void* stream) {
  for_dtype_and_head_dim(p, ForwardLauncher{p, stream});
}

}  // namespace alitok
