// Conversions between float32 and the element types of tensors in CUDA kernels.
#pragma once

#include <type_traits>

#include "cuda_kernel.h"
#include "e4m3.h"

namespace alitok {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(e4m3 x) { return from_e4m3(x); }
__device__ __forceinline__ float to_float(int8_t x) { return static_cast<float>(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half(x);
}
template <>
__device__ __forceinline__ e4m3 from_float(float x) {
  return to_e4m3(x);
}

// x as it is after a trip through T.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// Eight neighbouring elements, moved in accesses of up to 16 bytes.
template <class T>
struct alignas(8 * sizeof(T) < 16 ? 8 * sizeof(T) : 16) Eight {
  T x[8];
};

// The same as they lie in memory, in whole registers until widen() takes them apart.
template <class T>
struct PackedEight {
  uint32_t words[2 * sizeof(T)];
};

template <class T>
__device__ __forceinline__ PackedEight<T> load_eight(const T* from) {
  using Access = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
  PackedEight<T> packed;
#pragma unroll
  for (size_t i = 0; i < sizeof(packed) / sizeof(Access); ++i) {
    const Access part = reinterpret_cast<const Access*>(from)[i];
    memcpy(packed.words + i * sizeof(Access) / 4, &part, sizeof(part));
  }
  return packed;
}

template <class T>
__device__ __forceinline__ void widen(const PackedEight<T>& from, float (&to)[8]) {
  if constexpr (sizeof(T) == 4) {
    memcpy(&to, &from, sizeof(to));
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // one instruction each, which the compiler does not find
        to[2 * i] = __uint_as_float(from.words[i] << 16);
        to[2 * i + 1] = __uint_as_float(from.words[i] & 0xffff0000u);
      } else {
        const float2 pair = unpack2<T>(from.words[i]);
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
      }
    }
  } else {
    static_assert(std::is_same_v<T, e4m3>);
#if !defined(ALITOK_SIMT) && __CUDA_ARCH__ >= 890
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // the device converts two at once to float16, which has every value of e4m3
      const uint16_t bytes = static_cast<uint16_t>(from.words[i / 2] >> (16 * (i % 2)));
      uint32_t halves;
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(bytes));
      const float2 pair = unpack2<__half>(halves);
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
#else
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[i] = to_float(T{static_cast<uint8_t>(from.words[i / 4] >> (8 * (i % 4)))});
    }
#endif
  }
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// The reduction over a block of whole warps by `reduce`, which is one over a warp; every thread gets the result.
// `scratch` holds a float for each warp. Barriers on both sides order shared memory around it.
template <class Reduce>
__device__ __forceinline__ float block_reduce(float x, float identity, float* scratch, Reduce reduce) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = reduce(x);
  __syncthreads();  // what the scratch held before has been read
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return reduce(lane < warps ? scratch[lane] : identity);
}

}  // namespace alitok
