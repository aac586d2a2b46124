// Backward, after "FlashAttention-2" (Dao 2023), but without atomics, so that every result is the same bits in every
// run: one kernel walks the key tiles of a query tile (grad of queries), another the query tiles of a key tile (grads of
// keys and values), each recomputing probabilities from the saved log-sum-exp. That is seven matrix products instead of
// five, and at the lengths of this system cheaper than atomic sums in a float copy of grad_q and its conversion.
//
// A first pass writes RowStats; where there is a norm or a rotary table, the prepared queries and
// keys, which here would otherwise be prepared once for each tile that meets them; and with dropout its bits, which both
// kernels would otherwise make for themselves, and the second twice, for tiles of half the columns that a counter serves.
#include "cuda_column_sums.h"
#include "prefix_attention_cuda.h"

namespace alitok {
namespace {

// What a row of probabilities and their gradients are computed with: probability = 2^(logit - lse), in base 2, and
// delta = rowsum(grad_out * out).
struct alignas(8) RowStats {
  float lse, delta;
};

template <class T, int kDim>
struct BackwardShape {
  static constexpr int kThreads = 128, kRows = 64;  // a warp owns 16 rows: queries, or keys and values
  static constexpr bool kWide = kDim > 80;
  // Of a tile that the block walks over.
  static constexpr int kColumns = sizeof(T) == 2 ? (kWide ? 32 : 64) : (kWide ? 16 : 32);
  // Whether one block computes the gradients of keys and of values. Sums of both would be half of all registers for wide
  // rows of floats: there each has a launch.
  static constexpr bool kTogether = sizeof(T) == 2 || !kWide;
  // Blocks of grad_kv_kernel on a multiprocessor, by its registers; 0 leaves it to the compiler. For 16 bits it is told,
  // because it would spill for the sake of a third block, or use so many that the third does not fit.
  static constexpr int kBlocks = sizeof(T) == 4 ? 0 : kDim <= 48 ? 3 : 2;
  using Row = SharedRow<T, kDim, kThreads / kRows>;

  struct Shared {
    alignas(16) T rows[2][kRows][kStride<T, kDim>];           // q and grad_out, or k and v
    alignas(16) T columns[2][2][kColumns][kStride<T, kDim>];  // by stage; k and v, or q and grad_out
    alignas(16) RowStats stats[2][kColumns];
    float weight[kDim];
    alignas(16) uint8_t keep[2][kRows][16];  // dropout, see Scratch; for rows or columns, whichever are queries
  };
  static_assert(kRows >= kColumns);
  using Staged = float[kRows][kDim + 4];  // over `rows` and `columns` when the walk is done
  static_assert(sizeof(Staged) <= sizeof(Shared::rows) + sizeof(Shared::columns));
};
constexpr int kBlockRows = 64;

int64_t tiles_of(const PrefixAttentionParams& p) { return (p.length + kBlockRows - 1) / kBlockRows; }

// Groups of columns that a row's dropout counters serve.
ALITOK_HOST_DEVICE int64_t keep_groups(const PrefixAttentionParams& p) {
  return p.dropout.threshold == 0 ? 0 : (p.length + kDropoutColumns - 1) / kDropoutColumns;
}

// Byte offsets in the workspace.
struct Layout {
  int64_t q, k;      // prepared, (B, H, L, D), empty when there is nothing to prepare
  int64_t stats;     // (B, H, L) RowStats
  int64_t keep;      // (B, H, groups, L, 16) bytes, empty without dropout
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
  layout.stats = layout.k + prepared_bytes;
  layout.keep = layout.stats + padded(rows * static_cast<int64_t>(sizeof(RowStats)));
  layout.partials = layout.keep + padded(rows * keep_groups(p) * 16);
  layout.bytes = layout.partials + (normed ? 2 * tiles_of(p) * p.batch * p.heads * p.head_dim * 4 : 0);
  return layout;
}

// The parts of the workspace.
template <class T>
struct Scratch {
  T *q, *k;  // prepared; null when queries and keys are used as they are
  RowStats* stats;
  uint8_t* keep;  // of a row, 16 bytes for each group of 128 columns that it sees: keep_bits of c = 0 .. 15
  float *q_partials, *k_partials;
};

template <class T>
Scratch<T> scratch_of(const PrefixAttentionParams& p) {
  const Layout layout = layout_of(p);
  char* base = static_cast<char*>(p.workspace);
  const bool prepared = layout.k != layout.q;
  float* partials = reinterpret_cast<float*>(base + layout.partials);
  return {prepared ? reinterpret_cast<T*>(base + layout.q) : nullptr,
          prepared ? reinterpret_cast<T*>(base + layout.k) : nullptr,
          reinterpret_cast<RowStats*>(base + layout.stats),
          reinterpret_cast<uint8_t*>(base + layout.keep),
          partials,
          partials + tiles_of(p) * p.batch * p.heads * p.head_dim};
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
__device__ __forceinline__ void write_stats(const PrefixAttentionBackwardParams& backward, RowStats* stats, int64_t bh,
                                            int position) {
  using Row = typename BackwardShape<T, kDim>::Row;
  const PrefixAttentionParams& p = backward.forward;
  Row out, grad;
  out.read(rows_of_output<T>(p, p.out, bh / p.heads, bh % p.heads), position);
  grad.read(rows_of_output<T>(p, backward.grad_out, bh / p.heads, bh % p.heads), position);
  float delta = 0.0f;
#pragma unroll
  for (int i = 0; i < Row::kChunks; ++i) {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) delta += out.x[i][e] * grad.x[i][e];
  }
  delta = Row::sum(delta);
  if (position < p.length && Row::column(0) == 0) {
    const int64_t row = bh * p.length + position;
    stats[row] = {p.lse[row] * kLog2e, delta};
  }
}

// Every counter of the tile's rows once. All rows of a tile see the same groups, as many as its last.
__device__ __forceinline__ void write_keep_bits(const PrefixAttentionParams& p, uint8_t* keep, int64_t bh, int first) {
  const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
  const int length = static_cast<int>(p.length), rows = min(kBlockRows, length - first);
  for (int group = 0; group * kDropoutColumns < visible_end(p, first + rows - 1); ++group) {
    uint8_t* to = keep + ((bh * keep_groups(p) + group) * p.length + first) * 16;
    for (int i = static_cast<int>(threadIdx.x); i < rows * 16; i += static_cast<int>(blockDim.x)) {
      to[i] = static_cast<uint8_t>(keep_bits(p, seed, bh, first + i / 16, group, i % 16));
    }
  }
}

// blockIdx.z says what a block does: 0 RowStats and the bits of dropout, 1 queries, 2 keys. So the loads of one do not wait
// for the arithmetic of another.
template <class T, int kDim>
__global__ __launch_bounds__(128) void prepare_kernel(const PrefixAttentionBackwardParams backward,
                                                      const Scratch<T> scratch) {
  using Row = typename BackwardShape<T, kDim>::Row;
  __shared__ float shared_weight[kDim];
  const PrefixAttentionParams& p = backward.forward;
  const int64_t bh = blockIdx.x;
  const int first = static_cast<int>(blockIdx.y) * kBlockRows, position = first + Row::row();
  if (blockIdx.z == 0) {
    if (p.dropout.threshold != 0) write_keep_bits(p, scratch.keep, bh, first);
    return write_stats<T, kDim>(backward, scratch.stats, bh, position);
  }

  const bool queries = blockIdx.z == 1;
  const float* weight = nullptr;
  if (p.q_norm_weight != nullptr) {
    load_weight<T, kDim>(shared_weight, queries ? p.q_norm_weight : p.k_norm_weight, p.head_dim);
    weight = shared_weight;
    __syncthreads();
  }
  Row row;
  row.read(rows_of<T>(p, bh / p.heads, bh % p.heads, queries ? 0 : 1), position);
  row.prepare(p, weight, position);
  if (position >= p.length) return;
  row.write((queries ? scratch.q : scratch.k) + (bh * p.length + position) * p.head_dim, static_cast<int>(p.head_dim));
}

// Where the bits of a head's rows for one group of columns begin.
__device__ __forceinline__ const uint8_t* keep_of_group(const PrefixAttentionParams& p, const uint8_t* keep, int64_t bh,
                                                        int group) {
  return keep + (bh * keep_groups(p) + group) * p.length * 16;
}

// Those of kCount rows, by the block's first threads; with cp_async, as a tile.
template <int kCount>
__device__ __forceinline__ void load_keep(uint8_t (*to)[16], const uint8_t* from, int first, int length) {
  const int i = static_cast<int>(threadIdx.x), row = first + i;
  if (i < kCount) cp_async16(to[i], from + (row < length ? int64_t{row} * 16 : 0), row < length);
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
#pragma unroll 16
      for (int row = 0; row < kBlockRows; ++row) sum += staged[row][d];
      partials[d] = sum;
    }
  }
  if (position < p.length) {
    T* to = static_cast<T*>(backward.grad_qkv) + (((b * p.length + position) * 3 + part) * p.heads + h) * p.head_dim;
    grad.write(to, static_cast<int>(p.head_dim));
  }
}

__global__ __launch_bounds__(kSumThreads) void sum_partials_kernel(const float* partials, int64_t rows, int head_dim,
                                                                   float* q_grad, float* k_grad) {
  sum_columns(partials + blockIdx.y * rows * head_dim, rows, head_dim, blockIdx.y == 0 ? q_grad : k_grad);
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

  load_tile<T, kDim, Shape::kThreads, Shape::kRows>(shared->rows[0][0], q_rows, q_first);
  load_tile<T, kDim, Shape::kThreads, Shape::kRows>(shared->rows[1][0], grad_rows, q_first);
  load_tile<T, kDim, Shape::kThreads, kColumns>(shared->columns[0][0][0], k_rows, 0);
  load_tile<T, kDim, Shape::kThreads, kColumns>(shared->columns[0][1][0], v_rows, 0);
  if (dropout) load_keep<Shape::kRows>(shared->keep[0], keep_of_group(p, scratch.keep, bh, 0), q_first, length);
  cp_async_commit();

  const int warp_row = warp_index() * 16, g = lane_index() / 4, t = lane_index() % 4;
  const int warp_first = q_first + warp_row, warp_last = warp_first + 15;
  RowStats stats[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_first + g + 8 * half;
    stats[half] = row < length ? scratch.stats[bh * length + row] : RowStats{0.0f, 0.0f};
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
      if (dropout && next % kDropoutColumns == 0) {
        const int group = static_cast<int>(next / kDropoutColumns);
        load_keep<Shape::kRows>(shared->keep[group % 2], keep_of_group(p, scratch.keep, bh, group), q_first, length);
      }
      cp_async_commit();
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
          const float probability = 8 * n + e < end ? exp2_fast(s[0][n][i] * scale_log2 - stats[half].lse) : 0.0f;
          float grad = grad_s[0][n][i] * dropout_scale;
          if (dropout) {
            const unsigned bits = shared->keep[first / 128 % 2][warp_row + g + 8 * half][n % 2 * 8 + 2 * t + e];
            if ((bits >> (first % 128 / 16 + n / 2) & 1) == 0) grad = 0.0f;
          }
          s[0][n][i] = probability * (grad - stats[half].delta);
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
template <class T, int kDim, bool kKeys, bool kValues>
__global__ __launch_bounds__(128, BackwardShape<T, kDim>::kBlocks) void grad_kv_kernel(
    const PrefixAttentionBackwardParams backward, const Scratch<T> scratch) {
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

  const RowStats* stats = scratch.stats + bh * length;
  const uint8_t* keep = keep_of_group(p, scratch.keep, bh, k_first / 128);
  const auto load_queries = [&](int stage, int first) {
    load_tile<T, kDim, Shape::kThreads, kColumns>(shared->columns[stage][0][0], q_rows, first);
    load_tile<T, kDim, Shape::kThreads, kColumns>(shared->columns[stage][1][0], grad_rows, first);
    if (dropout) load_keep<kColumns>(shared->keep[stage], keep, first, length);
    const int i = static_cast<int>(threadIdx.x);
    if (i < kColumns) {
      const bool valid = first + i < length;
      cp_async<sizeof(RowStats)>(&shared->stats[stage][i], stats + (valid ? first + i : 0), valid);
    }
    cp_async_commit();
  };
  const int q_begin = k_first < prefix ? 0 : k_first / kColumns * kColumns;  // earlier queries see none of these keys
  load_tile<T, kDim, Shape::kThreads, Shape::kRows>(shared->rows[0][0], k_rows, k_first);
  load_tile<T, kDim, Shape::kThreads, Shape::kRows>(shared->rows[1][0], v_rows, k_first);
  load_queries(0, q_begin);

  const int warp_row = warp_index() * 16, g = lane_index() / 4, t = lane_index() % 4;
  const int warp_first = k_first + warp_row;
  const int part = k_first % 128 / 16 + warp_index();
  const float scale_log2 = p.scale * kLog2e, dropout_scale = dropout ? p.dropout.scale : 1.0f;
  [[maybe_unused]] float grad_k[1][kDim / 8][4] = {}, grad_v[1][kDim / 8][4] = {};

  for (int first = q_begin, stage = 0; first < length; first += kColumns, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is complete for all, and nobody reads the other stage any more
    const int next = first + kColumns;
    if (next < length) load_queries(stage ^ 1, next);
    if (warp_first >= length || (warp_first >= prefix && warp_first >= next)) continue;

    float s[1][kTiles][4] = {};
    [[maybe_unused]] float grad_s[1][kTiles][4] = {};
    multiply_rows<T, kDim>(s, shared->rows[0][warp_row], shared->columns[stage][0][0]);
    if constexpr (kKeys) multiply_rows<T, kDim>(grad_s, shared->rows[1][warp_row], shared->columns[stage][1][0]);
    int begin[2], end = length - first - 2 * t;  // queries that see each of the lane's keys
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = warp_first + g + 8 * half;
      begin[half] = (key < prefix ? 0 : key) - first - 2 * t;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * n + 2 * t + e;
        const RowStats row = shared->stats[stage][column];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 2 * half + e;
          const bool seen = 8 * n + e >= begin[half] && 8 * n + e < end;
          const float probability = seen ? exp2_fast(s[0][n][i] * scale_log2 - row.lse) : 0.0f;
          float grad = grad_s[0][n][i] * dropout_scale;
          s[0][n][i] = probability;
          if (dropout) {
            const unsigned bits = shared->keep[stage][column][g + 8 * half];
            if ((bits >> part & 1) == 0) grad = s[0][n][i] = 0.0f;
          }
          grad_s[0][n][i] = probability * (grad - row.delta);
        }
      }
    }
    if constexpr (kValues) multiply_columns<T, kDim>(grad_v, s, shared->columns[stage][1][0]);
    if constexpr (kKeys) multiply_columns<T, kDim>(grad_k, grad_s, shared->columns[stage][0][0]);
  }

  const float* weight = !kKeys || p.k_norm_weight == nullptr ? nullptr : shared->weight;
  if (weight != nullptr) load_weight<T, kDim>(shared->weight, p.k_norm_weight, p.head_dim);
  __syncthreads();
  auto* staged = reinterpret_cast<float (*)[kDim + 4]>(shared);
  if constexpr (kValues) {
    stage_gradient<T, kDim>(staged, grad_v, dropout_scale);
    store_gradient<T, kDim>(backward, staged, bh, 2, k_first, nullptr, nullptr);
    __syncwarp();
  }
  if constexpr (kKeys) {
    stage_gradient<T, kDim>(staged, grad_k, p.scale);
    store_gradient<T, kDim>(backward, staged, bh, 1, k_first, weight,
                            scratch.k_partials + (tile * int64_t{gridDim.x} + bh) * p.head_dim);
  }
}

struct BackwardLauncher {
  const PrefixAttentionBackwardParams& backward;
  void* stream;

  template <class T, int kDim, bool kKeys, bool kValues>
  void launch_kv(dim3 grid, const Scratch<T>& scratch) const {
    using Shape = BackwardShape<T, kDim>;
    allow_shared_bytes(grad_kv_kernel<T, kDim, kKeys, kValues>, sizeof(typename Shape::Shared));
    ALITOK_LAUNCH((grad_kv_kernel<T, kDim, kKeys, kValues>), grid, Shape::kThreads, sizeof(typename Shape::Shared),
                  stream, backward, scratch);
  }

  template <class T, int kDim>
  void run() const {
    using Shape = BackwardShape<T, kDim>;
    static_assert(Shape::kRows == kBlockRows);
    const PrefixAttentionParams& p = backward.forward;
    const Scratch<T> scratch = scratch_of<T>(p);
    const size_t shared_bytes = sizeof(typename Shape::Shared);
    const dim3 grid(static_cast<unsigned>(p.batch * p.heads), static_cast<unsigned>(tiles_of(p)));
    const dim3 passes(grid.x, grid.y, scratch.q == nullptr ? 1 : 3);
    ALITOK_LAUNCH((prepare_kernel<T, kDim>), passes, Shape::kThreads, 0, stream, backward, scratch);
    allow_shared_bytes(grad_q_kernel<T, kDim>, shared_bytes);
    ALITOK_LAUNCH((grad_q_kernel<T, kDim>), grid, Shape::kThreads, shared_bytes, stream, backward, scratch);
    if constexpr (Shape::kTogether) {
      launch_kv<T, kDim, true, true>(grid, scratch);
    } else {
      launch_kv<T, kDim, false, true>(grid, scratch);
      launch_kv<T, kDim, true, false>(grid, scratch);
    }
    if (p.q_norm_weight != nullptr) {
      const dim3 sums(column_sum_blocks(p.head_dim), 2);
      ALITOK_LAUNCH(sum_partials_kernel, sums, kSumThreads, 0, stream, scratch.q_partials, int64_t{grid.x} * grid.y,
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
