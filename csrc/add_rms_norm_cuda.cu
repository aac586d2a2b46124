// A block for each row, which stays in registers between its uses: every input is read once. A thread owns eight columns
// of 128, sixteen apart, which one dropout counter serves.
#include "add_rms_norm.h"
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

__device__ __forceinline__ unsigned keep_bits(const AddRmsNormParams& p, uint64_t seed, int64_t first) {
  if (p.dropout.threshold == 0) return 0xffu;
  return dropout_bits(seed, p.dropout.threshold, 0, blockIdx.x, static_cast<uint32_t>(first / kDropoutColumns),
                      static_cast<uint32_t>(first % kApart));
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
  if (threadIdx.x * int64_t{kLine} < p.width * int64_t{sizeof(W)}) {
    prefetch(reinterpret_cast<const char*>(weight) + threadIdx.x * kLine);  // not read: the kernel ahead may write them
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
    const unsigned keep = delta == nullptr ? 0 : keep_bits(p, seed, begin);
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

template <class T, class W>
__global__ void __launch_bounds__(kThreads)
    add_rms_norm_backward_kernel(const AddRmsNormBackwardParams b, float* inverse_rms) {
  __shared__ float scratch[32];
  const AddRmsNormParams& p = b.forward;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.width, first = first_column(), step = columns_of_block();
  const float* x = p.x + row;
  const W* weight = static_cast<const W*>(p.weight);
  const T* grad_normed = static_cast<const T*>(b.grad_normed) + row;
  float squares = 0, products = 0;
  const auto read = [&](int64_t i, float& value, float& grad) {
    value = x[i];
    grad = to_float(grad_normed[i]) * to_float(weight[i]);
    squares += value * value;
    products += grad * value;
  };
  float kept[kKept] = {}, grads[kKept] = {};
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (first + k * kApart < p.width) read(first + k * kApart, kept[k], grads[k]);
  }
  for (int64_t begin = first + step; begin < p.width; begin += step) {
    for (int64_t i = begin; i < begin + kKept * kApart && i < p.width; i += kApart) {
      float value, grad;
      read(i, value, grad);
    }
  }
  const float inverse = rsqrtf(block_reduce(squares, 0.0f, scratch, warp_sum) / p.width + p.eps);
  const float mean = block_reduce(products, 0.0f, scratch, warp_sum) / p.width * inverse;
  if (threadIdx.x == 0) inverse_rms[blockIdx.x] = inverse;

  const uint64_t seed = b.grad_delta == nullptr ? 0 : seed_of(p);
  const auto write = [&](int64_t i, float value, float grad, bool keep) {
    float total = inverse * (grad - value * inverse * mean);
    if (b.grad_sum != nullptr) total += b.grad_sum[row + i];
    b.grad_x[row + i] = total;
    if (b.grad_delta == nullptr) return;
    if (p.dropout.threshold != 0) total = keep ? total * p.dropout.scale : 0.0f;
    static_cast<T*>(b.grad_delta)[row + i] = from_float<T>(total);
  };
  unsigned keep = b.grad_delta == nullptr ? 0 : keep_bits(p, seed, first);
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (first + k * kApart < p.width) write(first + k * kApart, kept[k], grads[k], (keep >> k & 1) != 0);
  }
  for (int64_t begin = first + step; begin < p.width; begin += step) {
    keep = b.grad_delta == nullptr ? 0 : keep_bits(p, seed, begin);
    for (int k = 0; k < kKept && begin + k * kApart < p.width; ++k) {
      const int64_t i = begin + k * kApart;
      write(i, x[i], to_float(grad_normed[i]) * to_float(weight[i]), (keep >> k & 1) != 0);
    }
  }
}

// A block's share of grad_weight: 32 columns, one part of the rows, eight of them at a time.
template <class T, class W>
__global__ void __launch_bounds__(kThreads)
    weight_gradient_kernel(const AddRmsNormBackwardParams b, const float* inverse_rms, float* partials) {
  __shared__ float sums[kThreads / 32][32];
  const AddRmsNormParams& p = b.forward;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane, part = blockIdx.y, parts = gridDim.y;
  const int64_t end = (part + 1) * p.rows / parts;
  float sum = 0;
  for (int64_t row = part * p.rows / parts + warp; column < p.width && row < end; row += kThreads / 32) {
    const int64_t at = row * p.width + column;
    sum += to_float(static_cast<const T*>(b.grad_normed)[at]) * rounded<W>(p.x[at] * inverse_rms[row]);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.width) return;
  for (int other = 1; other < kThreads / 32; ++other) sum += sums[other][lane];
  partials[part * p.width + column] = sum;
}

__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* partials, int64_t parts, int64_t width, float* grad_weight) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partials[part * width + column];
  grad_weight[column] = sum;
}

unsigned blocks_of(int64_t items, int64_t block) { return static_cast<unsigned>((items + block - 1) / block); }

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
    const int64_t parts = add_rms_norm_parts(p.rows);
    float *partials = static_cast<float*>(b.workspace), *inverse_rms = partials + parts * p.width;
    const dim3 rows(static_cast<unsigned>(p.rows)), grid(blocks_of(p.width, 32), static_cast<unsigned>(parts));
    ALITOK_LAUNCH((add_rms_norm_backward_kernel<T, W>), rows, threads_of(p), 0, stream, b, inverse_rms);
    ALITOK_LAUNCH((weight_gradient_kernel<T, W>), grid, kThreads, 0, stream, b, inverse_rms, partials);
    ALITOK_LAUNCH(sum_parts_kernel, blocks_of(p.width, kThreads), kThreads, 0, stream, partials, parts, p.width,
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
