#include "cuda_element.h"
#include "swiglu.h"

namespace alitok {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float swiglu_of(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

template <class T>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const SwigluParams p) {
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
  T* out = static_cast<T*>(p.out);
  const int64_t i = 8 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (i + 8 <= p.size) {
    const Eight<T> g = *reinterpret_cast<const Eight<T>*>(gate + i), u = *reinterpret_cast<const Eight<T>*>(up + i);
    Eight<T> result;
#pragma unroll
    for (int k = 0; k < 8; ++k) result.x[k] = from_float<T>(swiglu_of(to_float(g.x[k]), to_float(u.x[k])));
    *reinterpret_cast<Eight<T>*>(out + i) = result;
  } else {
    for (int64_t k = i; k < p.size; ++k) out[k] = from_float<T>(swiglu_of(to_float(gate[k]), to_float(up[k])));
  }
}

struct SwigluGradients {
  float gate, up;
};

__device__ __forceinline__ SwigluGradients gradients_of(float gate, float up, float grad) {
  const float sigmoid = 1.0f / (1.0f + __expf(-gate));
  return {grad * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)), grad * gate * sigmoid};
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) swiglu_backward_kernel(const SwigluBackwardParams b) {
  const T *gate = static_cast<const T*>(b.forward.gate), *up = static_cast<const T*>(b.forward.up);
  const T* grad = static_cast<const T*>(b.grad);
  T *grad_gate = static_cast<T*>(b.grad_gate), *grad_up = static_cast<T*>(b.grad_up);
  const int64_t i = 8 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (i + 8 <= b.forward.size) {
    const Eight<T> g = *reinterpret_cast<const Eight<T>*>(gate + i), u = *reinterpret_cast<const Eight<T>*>(up + i);
    const Eight<T> above = *reinterpret_cast<const Eight<T>*>(grad + i);
    Eight<T> of_gate, of_up;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const SwigluGradients result = gradients_of(to_float(g.x[k]), to_float(u.x[k]), to_float(above.x[k]));
      of_gate.x[k] = from_float<T>(result.gate);
      of_up.x[k] = from_float<T>(result.up);
    }
    *reinterpret_cast<Eight<T>*>(grad_gate + i) = of_gate;
    *reinterpret_cast<Eight<T>*>(grad_up + i) = of_up;
  } else {
    for (int64_t k = i; k < b.forward.size; ++k) {
      const SwigluGradients result = gradients_of(to_float(gate[k]), to_float(up[k]), to_float(grad[k]));
      grad_gate[k] = from_float<T>(result.gate);
      grad_up[k] = from_float<T>(result.up);
    }
  }
}

dim3 blocks_for(int64_t size) { return dim3(static_cast<unsigned>((size + 8 * kThreads - 1) / (8 * kThreads))); }

template <class T>
void launch(const SwigluParams& p, void* stream) {
  ALITOK_LAUNCH(swiglu_kernel<T>, blocks_for(p.size), kThreads, 0, stream, p);
}

template <class T>
void launch_backward(const SwigluBackwardParams& b, void* stream) {
  ALITOK_LAUNCH(swiglu_backward_kernel<T>, blocks_for(b.forward.size), kThreads, 0, stream, b);
}

}  // namespace

void swiglu_cuda(const SwigluParams& p, void* stream) {
  switch (p.dtype) {
    case SwigluDtype::float32: return launch<float>(p, stream);
    case SwigluDtype::bfloat16: return launch<__nv_bfloat16>(p, stream);
    case SwigluDtype::float16: return launch<__half>(p, stream);
  }
}

void swiglu_backward_cuda(const SwigluBackwardParams& b, void* stream) {
  switch (b.forward.dtype) {
    case SwigluDtype::float32: return launch_backward<float>(b, stream);
    case SwigluDtype::bfloat16: return launch_backward<__nv_bfloat16>(b, stream);
    case SwigluDtype::float16: return launch_backward<__half>(b, stream);
  }
}

}  // namespace alitok
