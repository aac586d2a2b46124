// A block for each row, which stays in registers between its two uses: x and delta are read once.
#include "add_rms_norm.h"
#include "cuda_element.h"

namespace alitok {
namespace {

constexpr int kThreads = 256;
constexpr int kKept = 8;  // elements a thread keeps; what a wider row has beyond is read again

template <class T>
__global__ void __launch_bounds__(kThreads) add_rms_norm_kernel(const AddRmsNormParams p) {
  __shared__ float scratch[32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.width;
  const float* x = p.x + row;
  const T* delta = static_cast<const T*>(p.delta);
  float kept[kKept];
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t i = k * kThreads + threadIdx.x;
    kept[k] = 0;
    if (i < p.width) {
      kept[k] = x[i];
      if (delta != nullptr) {
        kept[k] += to_float(delta[row + i]);
        p.sum[row + i] = kept[k];
      }
    }
    squares += kept[k] * kept[k];
  }
  for (int64_t i = kKept * kThreads + threadIdx.x; i < p.width; i += kThreads) {
    float value = x[i];
    if (delta != nullptr) {
      value += to_float(delta[row + i]);
      p.sum[row + i] = value;
    }
    squares += value * value;
  }
  const float inverse = rsqrtf(block_reduce(squares, 0.0f, scratch, warp_sum) / p.width + p.eps);

  const T* weight = static_cast<const T*>(p.weight);
  T* normed = static_cast<T*>(p.normed) + row;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t i = k * kThreads + threadIdx.x;
    if (i < p.width) normed[i] = from_float<T>(rounded<T>(kept[k] * inverse) * to_float(weight[i]));
  }
  const float* again = delta != nullptr ? p.sum + row : x;  // each thread reads what it wrote itself
  for (int64_t i = kKept * kThreads + threadIdx.x; i < p.width; i += kThreads) {
    normed[i] = from_float<T>(rounded<T>(again[i] * inverse) * to_float(weight[i]));
  }
}

template <class T>
void launch(const AddRmsNormParams& p, void* stream) {
  ALITOK_LAUNCH(add_rms_norm_kernel<T>, dim3(static_cast<unsigned>(p.rows)), kThreads, 0, stream, p);
}

}  // namespace

void add_rms_norm_cuda(const AddRmsNormParams& p, void* stream) {
  switch (p.dtype) {
    case AddRmsNormDtype::float32: return launch<float>(p, stream);
    case AddRmsNormDtype::bfloat16: return launch<__nv_bfloat16>(p, stream);
    case AddRmsNormDtype::float16: return launch<__half>(p, stream);
  }
}

}  // namespace alitok
