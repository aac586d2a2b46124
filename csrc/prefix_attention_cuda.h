// Device code shared by the forward and backward kernels of prefix_attention: matrix fragments for 16-bit and float
// tiles, tile loading, query/key preparation (RMSNorm, rotary table) and the dropout mask.
//
// Tiles lie in shared memory row by row, kDim elements (head_dim rounded up, zeros beyond it) and 16 bytes of padding:
// an odd number of 16-byte columns, which keeps ldmatrix free of bank conflicts for every kDim here.
#pragma once

#include "cuda_kernel.h"
#include "prefix_attention.h"

namespace alitok {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of a 16-byte chunk
template <class T, int kDim>
constexpr int kStride = kDim + kVector<T>;  // elements from a row of a tile to the next

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

template <class T>
__device__ __forceinline__ float rounded(float x) {
  return static_cast<float>(static_cast<T>(x));
}

// ---- matrix fragments ------------------------------------------------------------------------------------------
// One warp, D (16 x 8) += A (16 x kStep) B (kStep x 8). B fragments come in pairs, for 16 columns.

template <class T>
struct Fragments {  // bf16 and fp16: one mma.sync of depth 16
  static constexpr int kStep = 16;
  static constexpr int kUnroll = 8;                      // all of a tile's steps
  static constexpr int kRowSteps = 1, kColumnSteps = 1;  // of a part that add_products takes
  static constexpr bool kSumsFromZero = false;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2];
  };

  // A[m][k] = tile[m][k]
  static __device__ __forceinline__ A load_a(const T* tile, int stride) {
    const int lane = lane_index();
    A a;
    ldmatrix_x4(a.r, tile + lane % 16 * stride + lane / 16 * 8);
    return a;
  }
  // B[k][n] = tile[n][k], columns 0..7 and 8..15
  static __device__ __forceinline__ void load_b_rows(B (&b)[2], const T* tile, int stride) {
    const int lane = lane_index();
    uint32_t r[4];
    ldmatrix_x4(r, tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
    b[0] = {{r[0], r[1]}};
    b[1] = {{r[2], r[3]}};
  }
  // B[k][n] = tile[k][n]
  static __device__ __forceinline__ void load_b_columns(B (&b)[2], const T* tile, int stride) {
    const int lane = lane_index();
    uint32_t r[4];
    ldmatrix_x4_trans(r, tile + lane % 16 * stride + lane / 16 * 8);
    b[0] = {{r[0], r[1]}};
    b[1] = {{r[2], r[3]}};
  }
  // A = columns kStep * step .. of a result that is still in registers; goes with load_b_columns.
  template <int kTiles>
  static __device__ __forceinline__ A from_result(const float (&d)[kTiles][4], int step) {
    const float (&left)[4] = d[2 * step];
    const float (&right)[4] = d[2 * step + 1];
    return {{pack2<T>(left[0], left[1]), pack2<T>(left[2], left[3]), pack2<T>(right[0], right[1]),
             pack2<T>(right[2], right[3])}};
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    mma_m16n8k16<T>(d, a.r, b.r);
  }
};

// float: x = high + low with tf32 parts; three products keep all but 2^-22 of the exact one.
template <>
struct Fragments<float> {
  static constexpr int kStep = 8;
  static constexpr int kUnroll = 1;  // more is mostly compile time
  static constexpr int kRowSteps = 2, kColumnSteps = 4;
  static constexpr bool kSumsFromZero = true;
  struct A {
    uint32_t high[4], low[4];
  };
  struct B {
    uint32_t high[2], low[2];
  };

  static __device__ __forceinline__ void split(float x, uint32_t& high, uint32_t& low) {
    high = to_tf32(x);
    low = to_tf32(x - __uint_as_float(high));
  }
  static __device__ __forceinline__ A load_a(const float* tile, int stride) {
    const float* from = tile + lane_index() / 4 * stride + lane_index() % 4;
    A a;
    split(from[0], a.high[0], a.low[0]);
    split(from[8 * stride], a.high[1], a.low[1]);
    split(from[4], a.high[2], a.low[2]);
    split(from[8 * stride + 4], a.high[3], a.low[3]);
    return a;
  }
  static __device__ __forceinline__ void load_b_rows(B (&b)[2], const float* tile, int stride) {
    const float* from = tile + lane_index() / 4 * stride + lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      split(from[8 * i * stride], b[i].high[0], b[i].low[0]);
      split(from[8 * i * stride + 4], b[i].high[1], b[i].low[1]);
    }
  }
  // The instruction's k = t and t + 4 are rows 2 t and 2 t + 1 here, so that a result's columns 2 t and 2 t + 1, which
  // a lane holds, are A's k = t and t + 4 without a shuffle.
  static __device__ __forceinline__ void load_b_columns(B (&b)[2], const float* tile, int stride) {
    const float* from = tile + 2 * (lane_index() % 4) * stride + lane_index() / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      split(from[8 * i], b[i].high[0], b[i].low[0]);
      split(from[8 * i + stride], b[i].high[1], b[i].low[1]);
    }
  }
  template <int kTiles>
  static __device__ __forceinline__ A from_result(const float (&d)[kTiles][4], int step) {
    A a;
    split(d[step][0], a.high[0], a.low[0]);
    split(d[step][2], a.high[1], a.low[1]);
    split(d[step][1], a.high[2], a.low[2]);
    split(d[step][3], a.high[3], a.low[3]);
    return a;
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    mma_m16n8k8_tf32(d, a.low, b.high);
    mma_m16n8k8_tf32(d, a.high, b.low);
    mma_m16n8k8_tf32(d, a.high, b.high);
  }
};

// d[m][n] and d[m][n + 1] (16 x 8 each) += the products of a[k][m] and what load_b(b, k) loads, for all k.
//
// A matrix unit cuts its sums off instead of rounding them, always towards zero, so that the errors of a long running
// sum do not cancel and become larger than those of float additions. For float each call therefore sums from zero and
// adds the result by an ordinary addition, which rounds. In 16 bits the rounding of the operands is far larger.
template <class F, int kSteps, int kRowTiles, int kTiles, class Load>
__device__ __forceinline__ void add_products(float (&d)[kRowTiles][kTiles][4], int n,
                                             const typename F::A (&a)[kSteps][kRowTiles], const Load& load_b) {
  float sum[kRowTiles][2][4] = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    typename F::B b[2];
    load_b(b, k);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      F::multiply(F::kSumsFromZero ? sum[m][0] : d[m][n], a[k][m], b[0]);
      F::multiply(F::kSumsFromZero ? sum[m][1] : d[m][n + 1], a[k][m], b[1]);
    }
  }
  if constexpr (F::kSumsFromZero) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) d[m][n + i / 4][i % 4] += sum[m][i / 4][i % 4];
    }
  }
}

// d[m] (16 x 8 kTiles) += left (rows 16 m .. of 16 kRowTiles, kDim) right (8 kTiles x kDim)^T, in shared memory. Each
// fragment of `right` is loaded once for all row tiles.
template <class T, int kDim, int kRowTiles, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&d)[kRowTiles][kTiles][4], const T* left, const T* right) {
  using F = Fragments<T>;
  constexpr int kSteps = F::kRowSteps;
  static_assert(kDim % (kSteps * F::kStep) == 0);
#pragma unroll F::kUnroll
  for (int first = 0; first < kDim; first += kSteps * F::kStep) {
    typename F::A a[kSteps][kRowTiles];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        a[k][m] = F::load_a(left + 16 * m * kStride<T, kDim> + first + k * F::kStep, kStride<T, kDim>);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      add_products<F>(d, n, a, [&](typename F::B(&b)[2], int k) {
        F::load_b_rows(b, right + 8 * n * kStride<T, kDim> + first + k * F::kStep, kStride<T, kDim>);
      });
    }
  }
}

// d[m] (16 x kDim) += left[m] (16 x 8 kTiles, results in registers) right (8 kTiles x kDim, in shared memory).
template <class T, int kDim, int kRowTiles, int kTiles>
__device__ __forceinline__ void multiply_columns(float (&d)[kRowTiles][kDim / 8][4],
                                                 const float (&left)[kRowTiles][kTiles][4], const T* right) {
  using F = Fragments<T>;
  constexpr int kSteps = F::kColumnSteps * F::kStep > 8 * kTiles ? 8 * kTiles / F::kStep : F::kColumnSteps;
  static_assert(8 * kTiles % (kSteps * F::kStep) == 0);
#pragma unroll
  for (int first = 0; first < 8 * kTiles / F::kStep; first += kSteps) {
    typename F::A a[kSteps][kRowTiles];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) a[k][m] = F::from_result(left[m], first + k);
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      add_products<F>(d, n, a, [&](typename F::B(&b)[2], int k) {
        F::load_b_columns(b, right + (first + k) * F::kStep * kStride<T, kDim> + 8 * n, kStride<T, kDim>);
      });
    }
  }
}

// ---- tiles -----------------------------------------------------------------------------------------------------

// Rows of one head: row i at data + i * row_stride.
template <class T>
struct Rows {
  const T* data;
  int64_t row_stride;
  int length, head_dim;
  bool vectors;  // 16-byte aligned throughout
};

template <class T>
__device__ __forceinline__ Rows<T> rows_of(const PrefixAttentionParams& p, int64_t b, int64_t h, int part) {
  const T* data = static_cast<const T*>(p.qkv) + b * p.qkv_batch_stride + (part * p.heads + h) * p.head_dim;
  const bool vectors = reinterpret_cast<uintptr_t>(p.qkv) % 16 == 0 && p.qkv_batch_stride % kVector<T> == 0 &&
                       p.qkv_row_stride % kVector<T> == 0;
  return {data, p.qkv_row_stride, static_cast<int>(p.length), static_cast<int>(p.head_dim), vectors};
}

// One chunk to shared memory, zeros outside the matrix; asynchronous where alignment allows.
template <class T>
__device__ __forceinline__ void copy_chunk(T* to, const Rows<T>& rows, int row, int column) {
  const bool valid = row < rows.length && column < rows.head_dim;
  const T* from = rows.data + (valid ? row * rows.row_stride + column : 0);
  if (rows.vectors) {
    cp_async16(to, from, valid);
  } else {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) to[e] = valid ? from[e] : static_cast<T>(0.0f);
  }
}

// Rows first .. first + kCount, by the whole block, neighbouring threads on neighbouring chunks. Unrolled, the loop
// would hold the address of every chunk in registers for as long as the block walks.
template <class T, int kDim, int kThreads, int kCount>
__device__ __forceinline__ void load_tile(T* tile, const Rows<T>& rows, int first) {
  constexpr int kChunks = kDim / kVector<T>;
  static_assert(kCount * kChunks % kThreads == 0, "every thread copies equally many chunks");
#pragma unroll 1
  for (int i = 0; i < kCount * kChunks / kThreads; ++i) {
    const int chunk = static_cast<int>(threadIdx.x) + i * kThreads;
    const int row = chunk / kChunks, column = chunk % kChunks * kVector<T>;
    copy_chunk(tile + row * kStride<T, kDim> + column, rows, first + row, column);
  }
}

// ---- rows of queries and keys ----------------------------------------------------------------------------------

// kLanes lanes of one warp share a row: lanes with equal lane % (32 / kLanes); each has every kLanes-th chunk. Eight
// neighbouring lanes then touch one chunk column of eight rows, which is free of bank conflicts, and because a thread
// later prepares the very chunks that it copied, no barrier is needed between.
template <class T, int kDim, int kLanes>
struct SharedRow {
  static constexpr int kRowsPerWarp = 32 / kLanes;
  static constexpr int kChunks = kDim / kVector<T> / kLanes;
  static_assert(kDim / kVector<T> % kLanes == 0, "every lane has equally many chunks");

  static __device__ __forceinline__ int row() { return warp_index() * kRowsPerWarp + lane_index() % kRowsPerWarp; }
  static __device__ __forceinline__ int column(int i) {
    return (lane_index() / kRowsPerWarp + i * kLanes) * kVector<T>;
  }
  static __device__ __forceinline__ float sum(float x) {
#pragma unroll
    for (int distance = kRowsPerWarp; distance < 32; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
  }

  float x[kChunks][kVector<T>];

  __device__ __forceinline__ void read(const T* row_in_shared) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) unpack(i, *reinterpret_cast<const uint4*>(row_in_shared + column(i)));
  }
  __device__ __forceinline__ void read(const Rows<T>& rows, int row) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const T* from = rows.data + row * rows.row_stride + column(i);
      const bool valid = row < rows.length && column(i) < rows.head_dim;
      if (rows.vectors) {
        unpack(i, valid ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0));
      } else {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) x[i][e] = valid ? static_cast<float>(from[e]) : 0.0f;
      }
    }
  }
  // To aligned memory, columns below `columns`.
  __device__ __forceinline__ void write(T* to, int columns) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (column(i) < columns) *reinterpret_cast<uint4*>(to + column(i)) = packed(i);
    }
  }

  // What a query or key of the softmax is made of: RMSNorm when there are weights (kDim floats, rounded to T, in shared
  // memory), then the rotary table when there is one.
  __device__ __forceinline__ void prepare(const PrefixAttentionParams& p, const float* weight, int position) {
    if (weight != nullptr) {
      const float rstd = inverse_rms(p);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) x[i][e] = rounded<T>(rounded<T>(x[i][e] * rstd) * weight[column(i) + e]);
      }
    }
    if (p.rope != nullptr) rotate(p, position, 1.0f);
  }
  __device__ __forceinline__ float inverse_rms(const PrefixAttentionParams& p) const {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) squares += x[i][e] * x[i][e];
    }
    return rsqrtf(sum(squares) / static_cast<float>(p.head_dim) + p.norm_eps);
  }
  // Direction 1 turns by the table and rounds to T; -1 is the transpose, for gradients, and does not round.
  __device__ __forceinline__ void rotate(const PrefixAttentionParams& p, int position, float direction) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (position >= p.length || column(i) >= p.head_dim) continue;
      const float4* table = reinterpret_cast<const float4*>(p.rope + position * p.head_dim + column(i));
#pragma unroll
      for (int e = 0; e < kVector<T>; e += 4) {
        const float4 turn = __ldg(table + e / 4);  // cos, sin of two pairs
        turn_pair(x[i][e], x[i][e + 1], turn.x, turn.y * direction);
        turn_pair(x[i][e + 2], x[i][e + 3], turn.z, turn.w * direction);
      }
      if (direction > 0) {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) x[i][e] = rounded<T>(x[i][e]);
      }
    }
  }

 private:
  static __device__ __forceinline__ void turn_pair(float& even, float& odd, float cosine, float sine) {
    const float e = even * cosine - odd * sine;
    odd = even * sine + odd * cosine;
    even = e;
  }
  __device__ __forceinline__ void unpack(int i, uint4 bits) {
    T values[kVector<T>];
    memcpy(values, &bits, 16);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) x[i][e] = static_cast<float>(values[e]);
  }
  __device__ __forceinline__ uint4 packed(int i) const {
    T values[kVector<T>];
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) values[e] = static_cast<T>(x[i][e]);
    uint4 bits;
    memcpy(&bits, values, 16);
    return bits;
  }
};

// Norm weights as the operator uses them, rounded to T, zeros beyond head_dim; visible after the next barrier.
template <class T, int kDim>
__device__ __forceinline__ void load_weight(float* shared, const float* weight, int64_t head_dim) {
  for (int d = static_cast<int>(threadIdx.x); d < kDim; d += static_cast<int>(blockDim.x)) {
    shared[d] = d < head_dim ? rounded<T>(weight[d]) : 0.0f;
  }
}

// ---- mask and dropout ------------------------------------------------------------------------------------------

// Row i sees columns 0 .. visible_end(i) - 1.
__device__ __forceinline__ int visible_end(const PrefixAttentionParams& p, int i) {
  const int end = max(static_cast<int>(p.prefix_len), i + 1);
  return min(end, static_cast<int>(p.length));
}

// Bit q of the result: probability (bh, i, 128 group + 16 q + c) is kept.
__device__ __forceinline__ unsigned keep_bits(const PrefixAttentionParams& p, uint64_t seed, int64_t bh, int i,
                                              int group, int c) {
  return dropout_bits(seed, p.dropout.threshold, static_cast<uint32_t>(bh), static_cast<uint32_t>(i),
                      static_cast<uint32_t>(group), static_cast<uint32_t>(c));
}

}  // namespace

// Calls launcher.run<T, kDim>() with the smallest tile width that holds head_dim. Each width costs compile time: the
// models' own, of which 48 shares 64 in float.
template <class T, class Launcher>
void for_head_dim(int64_t head_dim, const Launcher& launcher) {
  if constexpr (sizeof(T) == 2) {
    if (head_dim <= 48) return launcher.template run<T, 48>();
  }
  if (head_dim <= 64) return launcher.template run<T, 64>();
  if (head_dim <= 80) return launcher.template run<T, 80>();
  launcher.template run<T, 128>();
}

template <class Launcher>
void for_dtype_and_head_dim(const PrefixAttentionParams& p, const Launcher& launcher) {
  if (p.rope != nullptr && reinterpret_cast<uintptr_t>(p.rope) % 16 != 0) {
    throw std::runtime_error("rope: expected data aligned to 16 bytes; pass rope.clone()");
  }
  switch (p.dtype) {
    case AttentionDtype::float32: return for_head_dim<float>(p.head_dim, launcher);
    case AttentionDtype::bfloat16: return for_head_dim<__nv_bfloat16>(p.head_dim, launcher);
    case AttentionDtype::float16: return for_head_dim<__half>(p.head_dim, launcher);
  }
}

}  // namespace alitok
