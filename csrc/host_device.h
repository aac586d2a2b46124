// Marks a function that CPU and CUDA kernels share.
// Internal linkage: the CPU kernels are compiled for several instruction sets, and must not share one copy.
#pragma once

#ifdef __CUDACC__
#define ALITOK_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define ALITOK_HOST_DEVICE static inline
#endif
