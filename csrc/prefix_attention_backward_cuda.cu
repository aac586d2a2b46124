// Backward, after "FlashAttention-2" (Dao 2023), but without atomics, so that every result is the same bits in every
// run: one kernel walks the key tiles of a query tile (grad of queries), another the query tiles of a key tile (grads of
// keys and values), each recomputing probabilities from the saved log-sum-exp. That is seven matrix products instead of
// five, and at the lengths of this system cheaper than atomic sums in a float copy of grad_q and its conversion.
//
// A first pass writes delta = rowsum(grad_out * out) and, where there is a norm or a rotary table, the prepared queries
// and keys, which here would otherwise be prepared once for each tile that meets them.
#include "prefix_attention_cuda.h"

namespace alitok {
namespace {

template <class T, int kDim>
struct BackwardShape {
  static constexpr int kThreads = 128, kRows = 64;  // a warp owns 16 rows: queries, or keys and values
  static constexpr int kColumns = sizeof(T) == 2 && kDim <= 80 ? 64 : 32;  // of a tile that the block walks over
  using Row = SharedRow<T, kDim, kThreads / kRows>;

  struct Shared {
    alignas(16) T rows[2][kRows][kStride<T, kDim>];           // q and grad_out, or k and v
    alignas(16) T columns[2][2][kColumns][kStride<T, kDim>];  // by stage; k and v, or q and grad_out
    float lse[2][kColumns], delta[2][kColumns];
    float weight[kDim];
    alignas(16) uint8_t keep[2 * kColumns > kRows ? 2 * kColumns : kRows][16];
  };
  using Staged = float[kRows][kDim + 4];  // over `rows` and `columns` when the walk is done
  static_assert(sizeof(Staged) <= sizeof(Shared::rows) + sizeof(Shared::columns));
};
constexpr int kBlockRows = 64;

int64_t tiles_of(const PrefixAttentionParams& p) { return (p.length + kBlockRows - 1) / kBlockRows; }

// Byte offsets in the workspace.
struct Layout {
  int64_t q, k;      // prepared, (B, H, L, D), empty when there is nothing to prepare
  int64_t delta;     // (B, H, L) float
  int64_t partials;  // (2, tiles * B * H, D) float: each block's share of the norm weights' gradients
  int64_t bytes;
};

Layout layout_of(const PrefixAttentionParams& p) {
  const auto padded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const bool normed = p.q_norm_weight != nullptr, prepared = normed || p.rope != nullptr;
  const int64_t rows = p.batch * p.heads * p.length, element = p.dtype == AttentionDtype::float32 ? 4 : 2;
  const int64_t prepared_bytes = prepared ? padded(rows * p.head_dim * element) : 0;
  Layout layout{};
  layout.k = layout.q + prepared_bytes;
  layout.delta = layout.k + prepared_bytes;
  layout.partials = layout.delta + padded(rows * 4);
  layout.bytes = layout.partials + (normed ? 2 * tiles_of(p) * p.batch * p.heads * p.head_dim * 4 : 0);
  return layout;
}

// The parts of the workspace.
template <class T>
struct Scratch {
  T *q, *k;  // prepared; null when queries and keys are used as they are
  float* delta;
  float *q_partials, *k_partials;
};

template <class T>
Scratch<T> scratch_of(const PrefixAttentionParams& p) {
  const Layout layout = layout_of(p);
  char* base = static_cast<char*>(p.workspace);
  const bool prepared = layout.k != layout.q;
  float* partials = reinterpret_cast<float*>(base + layout.partials);
  return {prepared ? reinterpret_cast<T*>(base + layout.q) : nullptr,
          prepared ? reinterpret_cast<T*>(base + layout.k) : nullptr, reinterpret_cast<float*>(base + layout.delta),
          partials, partials + tiles_of(p) * p.batch * p.heads * p.head_dim};
}

// Rows of one head of a contiguous (B, L, H, D) tensor.
template <class T>
__device__ __forceinline__ Rows<T> rows_of_output(const PrefixAttentionParams& p, const void* data, int64_t b,
                                                  int64_t h) {
  const T* first = static_cast<const T*>(data) + (b * p.length * p.heads + h) * p.head_dim;
  return {first, p.heads * p.head_dim, static_cast<int>(p.length), static_cast<int>(p.head_dim),
          reinterpret_cast<uintptr_t>(data) % 16 == 0};
}

// Queries (part 0) or keys (part 1) as the softmax sees them.
template <class T>
__device__ __forceinline__ Rows<T> prepared_rows(const PrefixAttentionParams& p, const T* prepared, int64_t bh,
                                                 int part) {
  if (prepared == nullptr) return rows_of<T>(p, bh / p.heads, bh % p.heads, part);
  return {prepared + bh * p.length * p.head_dim, p.head_dim, static_cast<int>(p.length), static_cast<int>(p.head_dim),
          true};
}

// ---- first pass ------------------------------------------------------------------------------------------------

template <class T, int kDim>
__global__ __launch_bounds__(128) void prepare_kernel(const PrefixAttentionBackwardParams backward,
                                                      const Scratch<T> scratch) {
  using Row = typename BackwardShape<T, kDim>::Row;
  __shared__ float weights[2][kDim];
  const PrefixAttentionParams& p = backward.forward;
  const int64_t bh = blockIdx.x, b = bh / p.heads, h = bh % p.heads;
  const int position = static_cast<int>(blockIdx.y) * kBlockRows + Row::row();
  const bool normed = p.q_norm_weight != nullptr;
  if (normed) {
    load_weight<T, kDim>(weights[0], p.q_norm_weight, p.head_dim);
    load_weight<T, kDim>(weights[1], p.k_norm_weight, p.head_dim);
    __syncthreads();
  }

  Row out, grad;
  out.read(rows_of_output<T>(p, p.out, b, h), position);
  grad.read(rows_of_output<T>(p, backward.grad_out, b, h), position);
  float delta = 0.0f;
#pragma unroll
  for (int i = 0; i < Row::kChunks; ++i) {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) delta += out.x[i][e] * grad.x[i][e];
  }
  delta = Row::sum(delta);
  if (position < p.length && Row::column(0) == 0) scratch.delta[bh * p.length + position] = delta;

  if (scratch.q == nullptr) return;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    Row row;
    row.read(rows_of<T>(p, b, h, part), position);
    row.prepare(p, normed ? weights[part] : nullptr, position);
    if (position < p.length) {
      row.write((part == 0 ? scratch.q : scratch.k) + (bh * p.length + position) * p.head_dim,
                static_cast<int>(p.head_dim));
    }
  }
}

// ---- gradients of the inputs from those of prepared queries and keys -------------------------------------------

// The block's 64 rows of a gradient, from the lanes' fragments, to float rows in shared memory. A warp's rows are read
// by that warp only.
template <class T, int kDim>
__device__ __forceinline__ void stage_gradient(float (*staged)[kDim + 4], const float (&d)[1][kDim / 8][4],
                                               float factor) {
  const int row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) staged[row + e / 2 * 8][8 * n + column + e % 2] = d[0][n][e] * factor;
  }
  __syncwarp();
}

template <class T, int kDim>
__device__ __forceinline__ void read_staged(typename BackwardShape<T, kDim>::Row& row, float (*staged)[kDim + 4]) {
  using Row = typename BackwardShape<T, kDim>::Row;
#pragma unroll
  for (int i = 0; i < Row::kChunks; ++i) {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) row.x[i][e] = staged[Row::row()][Row::column(i) + e];
  }
}

// Back through rotary table and RMSNorm, and out to grad_qkv. `partials` (head_dim of this block) receives the sum of the
// rows' share of the norm weight's gradient.
template <class T, int kDim>
__device__ __forceinline__ void store_gradient(const PrefixAttentionBackwardParams& backward, float (*staged)[kDim + 4],
                                               int64_t bh, int part, int first, const float* weight, float* partials) {
  using Row = typename BackwardShape<T, kDim>::Row;
  const PrefixAttentionParams& p = backward.forward;
  const int64_t b = bh / p.heads, h = bh % p.heads;
  const int position = first + Row::row();
  Row grad;
  read_staged<T, kDim>(grad, staged);
  if (part < 2 && p.rope != nullptr) grad.rotate(p, position, -1.0f);
  if (part < 2 && weight != nullptr) {
    // y = n w, n = x rstd: grad_x = rstd (grad_n - n mean(grad_n n)), grad_w = sum over rows of grad_y n (as rounded).
    Row x;
    x.read(rows_of<T>(p, b, h, part), position);
    const float rstd = x.inverse_rms(p);
    float products = 0.0f;
#pragma unroll
    for (int i = 0; i < Row::kChunks; ++i) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        const int column = Row::column(i) + e;
        const float n = x.x[i][e] * rstd;
        staged[Row::row()][column] = position < p.length ? grad.x[i][e] * rounded<T>(n) : 0.0f;
        grad.x[i][e] *= weight[column];
        products += grad.x[i][e] * n;
        x.x[i][e] = n;
      }
    }
    const float mean = Row::sum(products) / static_cast<float>(p.head_dim);
#pragma unroll
    for (int i = 0; i < Row::kChunks; ++i) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) grad.x[i][e] = rstd * (grad.x[i][e] - x.x[i][e] * mean);
    }
    __syncthreads();
    for (int d = static_cast<int>(threadIdx.x); d < p.head_dim; d += static_cast<int>(blockDim.x)) {
      float sum = 0.0f;
      for (int row = 0; row < kBlockRows; ++row) sum += staged[row][d];
      partials[d] = sum;
    }
  }
  if (position < p.length) {
    T* to = static_cast<T*>(backward.grad_qkv) + (((b * p.length + position) * 3 + part) * p.heads + h) * p.head_dim;
    grad.write(to, static_cast<int>(p.head_dim));
  }
}

__global__ __launch_bounds__(256) void sum_partials_kernel(const float* partials, int64_t rows, int head_dim,
                                                           float* q_grad, float* k_grad) {
  __shared__ float sums[8][32];
  const int column = static_cast<int>(blockIdx.x) * 32 + lane_index();
  const float* from = partials + blockIdx.y * rows * head_dim;
  float sum = 0.0f;
  if (column < head_dim) {
    for (int64_t row = warp_index(); row < rows; row += 8) sum += from[row * head_dim + column];
  }
  sums[warp_index()][lane_index()] = sum;
  __syncthreads();
  if (warp_index() == 0 && column < head_dim) {
    for (int i = 1; i < 8; ++i) sum += sums[i][lane_index()];
    (blockIdx.y == 0 ? q_grad : k_grad)[column] = sum;
  }
}

// ---- gradient of the queries -----------------------------------------------------------------------------------

template <class T, int kDim>
__global__ __launch_bounds__(128) void grad_q_kernel(const PrefixAttentionBackwardParams backward,
                                                     const Scratch<T> scratch) {
  using Shape = BackwardShape<T, kDim>;
  constexpr int kColumns = Shape::kColumns, kTiles = kColumns / 8;
  ALITOK_DYNAMIC_SHARED(typename Shape::Shared, shared);
  const PrefixAttentionParams& p = backward.forward;
  const int length = static_cast<int>(p.length), prefix = static_cast<int>(p.prefix_len);
  const int64_t bh = blockIdx.x, b = bh / p.heads, h = bh % p.heads;
  const int tile = static_cast<int>(gridDim.y - 1 - blockIdx.y), q_first = tile * Shape::kRows;
  const int key_end = visible_end(p, min(q_first + Shape::kRows, length) - 1);
  const Rows<T> q_rows = prepared_rows(p, scratch.q, bh, 0), k_rows = prepared_rows(p, scratch.k, bh, 1);
  const Rows<T> v_rows = rows_of<T>(p, b, h, 2), grad_rows = rows_of_output<T>(p, backward.grad_out, b, h);
  const bool dropout = p.dropout.threshold != 0;
  const uint64_t seed = dropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;

  load_tile<T, kDim, Shape::kThreads, Shape::kRows>(shared->rows[0][0], q_rows, q_first);
  load_tile<T, kDim, Shape::kThreads, Shape::kRows>(shared->rows[1][0], grad_rows, q_first);
  load_tile<T, kDim, Shape::kThreads, kColumns>(shared->columns[0][0][0], k_rows, 0);
  load_tile<T, kDim, Shape::kThreads, kColumns>(shared->columns[0][1][0], v_rows, 0);
  cp_async_commit();

  const int warp_row = warp_index() * 16, g = lane_index() / 4, t = lane_index() % 4;
  const int warp_first = q_first + warp_row, warp_last = warp_first + 15;
  float lse_log2[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_first + g + 8 * half;
    lse_log2[half] = row < length ? p.lse[bh * length + row] * kLog2e : 0.0f;
    delta[half] = row < length ? scratch.delta[bh * length + row] : 0.0f;
  }
  const float scale_log2 = p.scale * kLog2e, dropout_scale = dropout ? p.dropout.scale : 1.0f;
  float grad_q[1][kDim / 8][4] = {};

  for (int first = 0, stage = 0; first < key_end; first += kColumns, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is complete for all, and nobody reads the other stage any more
    const int next = first + kColumns;
    if (next < key_end) {
      load_tile<T, kDim, Shape::kThreads, kColumns>(shared->columns[stage ^ 1][0][0], k_rows, next);
      load_tile<T, kDim, Shape::kThreads, kColumns>(shared->columns[stage ^ 1][1][0], v_rows, next);
      cp_async_commit();
    }
    if (dropout && first % 128 == 0) {  // a warp makes and reads its own rows' bits
      __syncwarp();
      for (int i = lane_index(); i < 256; i += 32) {
        const int row = warp_row + i / 16;
        shared->keep[row][i % 16] = static_cast<uint8_t>(keep_bits(p, seed, bh, q_first + row, first / 128, i % 16));
      }
      __syncwarp();
    }
    if (warp_first >= length || (first >= prefix && first > warp_last)) continue;

    float s[1][kTiles][4] = {}, grad_s[1][kTiles][4] = {};
    multiply_rows<T, kDim>(s, shared->rows[0][warp_row], shared->columns[stage][0][0]);
    multiply_rows<T, kDim>(grad_s, shared->rows[1][warp_row], shared->columns[stage][1][0]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int end = visible_end(p, warp_first + g + 8 * half) - first - 2 * t;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = 2 * half + e;
          const float probability = 8 * n + e < end ? exp2_fast(s[0][n][i] * scale_log2 - lse_log2[half]) : 0.0f;
          float grad = grad_s[0][n][i] * dropout_scale;
          if (dropout) {
            const unsigned bits = shared->keep[warp_row + g + 8 * half][n % 2 * 8 + 2 * t + e];
            if ((bits >> (first % 128 / 16 + n / 2) & 1) == 0) grad = 0.0f;
          }
          s[0][n][i] = probability * (grad - delta[half]);
        }
      }
    }
    multiply_columns<T, kDim>(grad_q, s, shared->columns[stage][0][0]);
  }

  const float* weight = p.q_norm_weight == nullptr ? nullptr : shared->weight;
  if (weight != nullptr) load_weight<T, kDim>(shared->weight, p.q_norm_weight, p.head_dim);
  __syncthreads();
  auto* staged = reinterpret_cast<float (*)[kDim + 4]>(shared);
  stage_gradient<T, kDim>(staged, grad_q, p.scale);
  store_gradient<T, kDim>(backward, staged, bh, 0, q_first, weight,
                          scratch.q_partials + (tile * int64_t{gridDim.x} + bh) * p.head_dim);
}

// ---- gradients of keys and values ------------------------------------------------------------------------------

// Everything transposed: rows are keys, columns queries, so that probabilities and their gradients leave one product as
// the fragments that the next one takes.
template <class T, int kDim>
__global__ __launch_bounds__(128) void grad_kv_kernel(const PrefixAttentionBackwardParams backward,
                                                      const Scratch<T> scratch) {
  using Shape = BackwardShape<T, kDim>;
  constexpr int kColumns = Shape::kColumns, kTiles = kColumns / 8;
  ALITOK_DYNAMIC_SHARED(typename Shape::Shared, shared);
  const PrefixAttentionParams& p = backward.forward;
  const int length = static_cast<int>(p.length), prefix = static_cast<int>(p.prefix_len);
  const int64_t bh = blockIdx.x, b = bh / p.heads, h = bh % p.heads;
  const int tile = static_cast<int>(blockIdx.y), k_first = tile * Shape::kRows;
  const Rows<T> q_rows = prepared_rows(p, scratch.q, bh, 0), k_rows = prepared_rows(p, scratch.k, bh, 1);
  const Rows<T> v_rows = rows_of<T>(p, b, h, 2), grad_rows = rows_of_output<T>(p, backward.grad_out, b, h);
  const bool dropout = p.dropout.threshold != 0;
  const uint64_t seed = dropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;

  const auto load_queries = [&](int stage, int first) {
    load_tile<T, kDim, Shape::kThreads, kColumns>(shared->columns[stage][0][0], q_rows, first);
    load_tile<T, kDim, Shape::kThreads, kColumns>(shared->columns[stage][1][0], grad_rows, first);
    cp_async_commit();
    const int i = static_cast<int>(threadIdx.x);
    if (i < kColumns) {
      const bool valid = first + i < length;
      shared->lse[stage][i] = valid ? p.lse[bh * length + first + i] * kLog2e : 0.0f;
      shared->delta[stage][i] = valid ? scratch.delta[bh * length + first + i] : 0.0f;
    }
    if (dropout) {
      for (int c = i; c < kColumns * 16; c += Shape::kThreads) {
        shared->keep[stage * kColumns + c / 16][c % 16] =
            static_cast<uint8_t>(keep_bits(p, seed, bh, first + c / 16, k_first / 128, c % 16));
      }
    }
  };
  const int q_begin = k_first < prefix ? 0 : k_first / kColumns * kColumns;  // earlier queries see none of these keys
  load_tile<T, kDim, Shape::kThreads, Shape::kRows>(shared->rows[0][0], k_rows, k_first);
  load_tile<T, kDim, Shape::kThreads, Shape::kRows>(shared->rows[1][0], v_rows, k_first);
  load_queries(0, q_begin);

  const int warp_row = warp_index() * 16, g = lane_index() / 4, t = lane_index() % 4;
  const int warp_first = k_first + warp_row;
  const int part = k_first % 128 / 16 + warp_index();
  const float scale_log2 = p.scale * kLog2e, dropout_scale = dropout ? p.dropout.scale : 1.0f;
  float grad_k[1][kDim / 8][4] = {}, grad_v[1][kDim / 8][4] = {};

  for (int first = q_begin, stage = 0; first < length; first += kColumns, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is complete for all, and nobody reads the other stage any more
    const int next = first + kColumns;
    if (next < length) load_queries(stage ^ 1, next);
    if (warp_first >= length || (warp_first >= prefix && warp_first >= next)) continue;

    float s[1][kTiles][4] = {}, grad_s[1][kTiles][4] = {};
    multiply_rows<T, kDim>(s, shared->rows[0][warp_row], shared->columns[stage][0][0]);
    multiply_rows<T, kDim>(grad_s, shared->rows[1][warp_row], shared->columns[stage][1][0]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = warp_first + g + 8 * half;
      const int begin = (key < prefix ? 0 : key) - first - 2 * t, end = length - first - 2 * t;  // queries that see it
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = 2 * half + e, column = 8 * n + 2 * t + e;
          const bool seen = 8 * n + e >= begin && 8 * n + e < end;
          const float probability = seen ? exp2_fast(s[0][n][i] * scale_log2 - shared->lse[stage][column]) : 0.0f;
          float grad = grad_s[0][n][i] * dropout_scale;
          s[0][n][i] = probability;
          if (dropout) {
            const unsigned bits = shared->keep[stage * kColumns + column][g + 8 * half];
            if ((bits >> part & 1) == 0) grad = s[0][n][i] = 0.0f;
          }
          grad_s[0][n][i] = probability * (grad - shared->delta[stage][column]);
        }
      }
    }
    multiply_columns<T, kDim>(grad_v, s, shared->columns[stage][1][0]);
    multiply_columns<T, kDim>(grad_k, grad_s, shared->columns[stage][0][0]);
  }

  const float* weight = p.k_norm_weight == nullptr ? nullptr : shared->weight;
  if (weight != nullptr) load_weight<T, kDim>(shared->weight, p.k_norm_weight, p.head_dim);
  __syncthreads();
  auto* staged = reinterpret_cast<float (*)[kDim + 4]>(shared);
  stage_gradient<T, kDim>(staged, grad_v, dropout_scale);
  store_gradient<T, kDim>(backward, staged, bh, 2, k_first, nullptr, nullptr);
  __syncwarp();
  stage_gradient<T, kDim>(staged, grad_k, p.scale);
  store_gradient<T, kDim>(backward, staged, bh, 1, k_first, weight,
                          scratch.k_partials + (tile * int64_t{gridDim.x} + bh) * p.head_dim);
}

struct BackwardLauncher {
  const PrefixAttentionBackwardParams& backward;
  void* stream;

  template <class T, int kDim>
  void run() const {
    using Shape = BackwardShape<T, kDim>;
    static_assert(Shape::kRows == kBlockRows);
    const PrefixAttentionParams& p = backward.forward;
    const Scratch<T> scratch = scratch_of<T>(p);
    const size_t shared_bytes = sizeof(typename Shape::Shared);
    const dim3 grid(static_cast<unsigned>(p.batch * p.heads), static_cast<unsigned>(tiles_of(p)));
    ALITOK_LAUNCH((prepare_kernel<T, kDim>), grid, Shape::kThreads, 0, stream, backward, scratch);
    allow_shared_bytes(grad_q_kernel<T, kDim>, shared_bytes);
    ALITOK_LAUNCH((grad_q_kernel<T, kDim>), grid, Shape::kThreads, shared_bytes, stream, backward, scratch);
    allow_shared_bytes(grad_kv_kernel<T, kDim>, shared_bytes);
    ALITOK_LAUNCH((grad_kv_kernel<T, kDim>), grid, Shape::kThreads, shared_bytes, stream, backward, scratch);
    if (p.q_norm_weight != nullptr) {
      const dim3 sums(static_cast<unsigned>((p.head_dim + 31) / 32), 2);
      ALITOK_LAUNCH(sum_partials_kernel, sums, 256, 0, stream, scratch.q_partials, int64_t{grid.x} * grid.y,
                    static_cast<int>(p.head_dim), backward.grad_q_norm_weight, backward.grad_k_norm_weight);
    }
  }
};

}  // namespace

int64_t prefix_attention_backward_workspace_cuda(const PrefixAttentionParams& p) { return layout_of(p).bytes; }

void prefix_attention_backward_cuda(const PrefixAttentionBackwardParams& backward, void* stream) {
  for_dtype_and_head_dim(backward.forward, BackwardLauncher{backward, stream});
}

}  // namespace alitok
