// A block holds a row at a time, in registers between its uses: every input is read once. A thread owns eight columns of
// 128, sixteen apart, which one dropout counter serves.
#include "add_rms_norm.h"
#include "cuda_column_sums.h"
#include "cuda_element.h"

namespace alitok {
namespace {

constexpr int kThreads = 256;  // at most: 2048 columns; what a wider row has beyond is read again
constexpr int kKept = 8;
constexpr int kApart = 16;
constexpr int kLine = 128;  // bytes that a prefetch fetches

__device__ __forceinline__ int64_t first_column() {
  return threadIdx.x / kApart * (kApart * kKept) + threadIdx.x % kApart;
}
__device__ __forceinline__ int64_t columns_of_block() { return int64_t{blockDim.x} * kKept; }

__device__ __forceinline__ unsigned keep_bits(const AddRmsNormParams& p, uint64_t seed, int64_t row, int64_t first) {
  if (p.dropout.threshold == 0) return 0xffu;
  return dropout_bits(seed, p.dropout.threshold, 0, static_cast<uint32_t>(row),
                      static_cast<uint32_t>(first / kDropoutColumns), static_cast<uint32_t>(first % kApart));
}

__device__ __forceinline__ uint64_t seed_of(const AddRmsNormParams& p) {
  return p.dropout.threshold == 0 ? 0 : static_cast<uint64_t>(*p.dropout.seed);
}

// As block_reduce with warp_sum, for a scratch that nothing has used before: one barrier, not two.
__device__ __forceinline__ float first_block_sum(float x, float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

// With few rows the time is that of waiting for memory. So all loads of a thread's columns come before their first use:
// the compiler, which cannot know that a store changes none of them, would leave a load behind each store.
template <class T, class W>
__global__ void __launch_bounds__(kThreads, 3) add_rms_norm_kernel(const AddRmsNormParams p) {
  __shared__ float scratch[32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.width, first = first_column(), step = columns_of_block();
  const T* delta = static_cast<const T*>(p.delta);
  const W* weight = static_cast<const W*>(p.weight);
  let_next_kernel_begin();
  if (blockIdx.x == 0 && threadIdx.x * int64_t{kLine} < p.width * int64_t{sizeof(W)}) {
    // Not read, for the kernel ahead may write them. One block does it for all: a prefetch goes past the first-level
    // cache, and those of thousands of blocks would queue for the same few lines.
    prefetch(reinterpret_cast<const char*>(weight) + threadIdx.x * kLine);
  }
  wait_for_kernel_ahead();
  W weights[kKept] = {};
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (first + k * kApart < p.width) weights[k] = weight[first + k * kApart];
  }

  const uint64_t seed = seed_of(p);
  float squares = 0;
  const auto add = [&](int64_t begin, float (&value)[kKept]) {
    T added[kKept] = {};
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int64_t i = begin + k * kApart;
      value[k] = i < p.width ? p.x[row + i] : 0;
      if (delta != nullptr && i < p.width) added[k] = delta[row + i];
    }
    const unsigned keep = delta == nullptr ? 0 : keep_bits(p, seed, blockIdx.x, begin);
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int64_t i = begin + k * kApart;
      if (i >= p.width) continue;
      if (delta != nullptr) {
        float term = to_float(added[k]);
        if (p.dropout.threshold != 0) term = (keep >> k & 1) != 0 ? term * p.dropout.scale : 0.0f;
        value[k] += term;
        p.sum[row + i] = value[k];
      }
      squares += value[k] * value[k];
    }
  };
  float kept[kKept];
  add(first, kept);
  for (int64_t i = first + step; i < p.width; i += step) {
    float rest[kKept];
    add(i, rest);
  }
  const float inverse = rsqrtf(first_block_sum(squares, scratch) / p.width + p.eps);

  T* normed = static_cast<T*>(p.normed) + row;
  const auto write = [&](int64_t i, float value, W factor) {
    normed[i] = from_float<T>(rounded<W>(value * inverse) * to_float(factor));
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (first + k * kApart < p.width) write(first + k * kApart, kept[k], weights[k]);
  }
  const float* again = (delta != nullptr ? p.sum : p.x) + row;  // each thread reads what it wrote itself
  for (int64_t begin = first + step; begin < p.width; begin += step) {
    for (int64_t i = begin; i < begin + kKept * kApart && i < p.width; i += kApart) write(i, again[i], weight[i]);
  }
}

// As many of a thread's first kKept columns as there are.
__device__ __forceinline__ int kept_columns(const AddRmsNormParams& p) {
  const int64_t count = (p.width - first_column() + kApart - 1) / kApart;
  return count <= 0 ? 0 : count < kKept ? static_cast<int>(count) : kKept;
}

struct RowSums {
  float squares, products;
};

// Over the block; every thread gets the result. `scratch` is not that of the call before: a thread that writes there has
// passed the barrier of the call between, and with it everyone's reads of the last one that used it.
__device__ __forceinline__ RowSums block_sums(RowSums sums, RowSums* scratch) {
  const int warps = blockDim.x / 32;
  sums = {warp_sum(sums.squares), warp_sum(sums.products)};
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sums;
  __syncthreads();
  sums = scratch[0];
  for (int warp = 1; warp < warps; ++warp) {
    sums.squares += scratch[warp].squares;
    sums.products += scratch[warp].products;
  }
  return sums;
}

// A block for every gridDim.x-th row. What its rows add to grad_weight stays with the threads that own the columns, so
// that x and grad_normed are read once, and goes to the block's row of `partials` at the end.
//
// As in the forward pass, all loads of a row come before the first use.
template <class T, class W>
__global__ void __launch_bounds__(kThreads, 3)
    add_rms_norm_backward_kernel(const AddRmsNormBackwardParams b, float* partials) {
  __shared__ RowSums scratch[2][kThreads / 32];
  const AddRmsNormParams& p = b.forward;
  const int64_t first = first_column(), step = columns_of_block();
  const int count = kept_columns(p);
  const W* weight = static_cast<const W*>(p.weight);
  float* partial = partials + blockIdx.x * p.width;
  const uint64_t seed = b.grad_delta == nullptr ? 0 : seed_of(p);
  W weights[kKept] = {};
  float shares[kKept] = {};
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (k < count) weights[k] = weight[first + k * kApart];
  }

  int stage = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, stage ^= 1) {
    const int64_t begin = row * p.width;
    const float *x = p.x + begin, *grad_sum = b.grad_sum == nullptr ? nullptr : b.grad_sum + begin;
    const T* grad_normed = static_cast<const T*>(b.grad_normed) + begin;
    float values[kKept] = {}, others[kKept] = {};
    T above[kKept] = {};
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      if (k >= count) continue;
      values[k] = x[first + k * kApart];
      above[k] = grad_normed[first + k * kApart];
      if (grad_sum != nullptr) others[k] = grad_sum[first + k * kApart];
    }
    unsigned keep = b.grad_delta == nullptr ? 0 : keep_bits(p, seed, row, first);
    RowSums sums = {0.0f, 0.0f};
    const auto add = [&](float value, T grad, W factor) {
      sums.squares += value * value;
      sums.products += to_float(grad) * to_float(factor) * value;
    };
#pragma unroll
    for (int k = 0; k < kKept; ++k) add(values[k], above[k], weights[k]);
    for (int64_t i = first + step; i < p.width; i += step) {
      for (int64_t j = i; j < i + kKept * kApart && j < p.width; j += kApart) add(x[j], grad_normed[j], weight[j]);
    }
    sums = block_sums(sums, scratch[stage]);
    const float inverse = rsqrtf(sums.squares / p.width + p.eps), mean = sums.products / p.width * inverse;

    // Writes the gradients of one element, and gives its share of grad_weight.
    const auto write = [&](int64_t i, float value, T grad, W factor, float other, bool kept) {
      const float normed = value * inverse;
      float total = inverse * (to_float(grad) * to_float(factor) - normed * mean) + other;
      b.grad_x[begin + i] = total;
      if (b.grad_delta != nullptr) {
        if (p.dropout.threshold != 0) total = kept ? total * p.dropout.scale : 0.0f;
        static_cast<T*>(b.grad_delta)[begin + i] = from_float<T>(total);
      }
      return to_float(grad) * rounded<W>(normed);
    };
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      if (k >= count) continue;
      shares[k] += write(first + k * kApart, values[k], above[k], weights[k], others[k], (keep >> k & 1) != 0);
    }
    for (int64_t i = first + step; i < p.width; i += step) {
      keep = b.grad_delta == nullptr ? 0 : keep_bits(p, seed, row, i);
      for (int k = 0; k < kKept && i + k * kApart < p.width; ++k) {
        const int64_t j = i + k * kApart;
        const float other = grad_sum == nullptr ? 0.0f : grad_sum[j];
        const float share = write(j, x[j], grad_normed[j], weight[j], other, (keep >> k & 1) != 0);
        partial[j] = row == blockIdx.x ? share : partial[j] + share;  // registers hold the first columns' only
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (k < count) partial[first + k * kApart] = shares[k];
  }
}

__global__ void __launch_bounds__(kSumThreads)
    sum_partials_kernel(const float* partials, int64_t rows, int64_t width, float* grad_weight) {
  sum_columns(partials, rows, width, grad_weight);
}

// Whole warps, as few as keep a row in registers.
unsigned threads_of(const AddRmsNormParams& p) {
  const int64_t wanted = (p.width + kDropoutColumns - 1) / kDropoutColumns * kApart;
  return wanted >= kThreads ? kThreads : static_cast<unsigned>((wanted + 31) / 32 * 32);
}

struct Forward {
  const AddRmsNormParams& p;
  void* stream;
  template <class T, class W>
  void run() const {
    ALITOK_LAUNCH_EARLY((add_rms_norm_kernel<T, W>), dim3(static_cast<unsigned>(p.rows)), threads_of(p), 0, stream, p);
  }
};

struct Backward {
  const AddRmsNormBackwardParams& b;
  void* stream;
  template <class T, class W>
  void run() const {
    const AddRmsNormParams& p = b.forward;
    const int64_t parts = add_rms_norm_parts_cuda(p.rows);
    float* partials = static_cast<float*>(b.workspace);
    ALITOK_LAUNCH((add_rms_norm_backward_kernel<T, W>), dim3(static_cast<unsigned>(parts)), threads_of(p), 0, stream, b,
                  partials);
    ALITOK_LAUNCH(sum_partials_kernel, column_sum_blocks(p.width), kSumThreads, 0, stream, partials, parts, p.width,
                  b.grad_weight);
  }
};

// f.run<T, W>() for the dtypes of p.
template <class F>
void with_types(const AddRmsNormParams& p, const F& f) {
  const bool exact = p.weight_dtype == AddRmsNormDtype::float32;
  switch (p.dtype) {
    case AddRmsNormDtype::float32: return f.template run<float, float>();
    case AddRmsNormDtype::bfloat16:
      return exact ? f.template run<__nv_bfloat16, float>() : f.template run<__nv_bfloat16, __nv_bfloat16>();
    case AddRmsNormDtype::float16: return exact ? f.template run<__half, float>() : f.template run<__half, __half>();
  }
}

}  // namespace

void add_rms_norm_cuda(const AddRmsNormParams& p, void* stream) { with_types(p, Forward{p, stream}); }

void add_rms_norm_backward_cuda(const AddRmsNormBackwardParams& b, void* stream) {
  with_types(b.forward, Backward{b, stream});
}

}  // namespace alitok
