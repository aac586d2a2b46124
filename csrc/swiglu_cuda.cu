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

template <class T>
void launch(const SwigluParams& p, void* stream) {
  const int64_t blocks = (p.size + 8 * kThreads - 1) / (8 * kThreads);
  ALITOK_LAUNCH(swiglu_kernel<T>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, p);
}

}  // namespace

void swiglu_cuda(const SwigluParams& p, void* stream) {
  switch (p.dtype) {
    case SwigluDtype::float32: return launch<float>(p, stream);
    case SwigluDtype::bfloat16: return launch<__nv_bfloat16>(p, stream);
    case SwigluDtype::float16: return launch<__half>(p, stream);
  }
}

}  // namespace alitok
