// What a .cu file may use, in two implementations: CUDA (nvcc), and a GPU-free emulation for tests
// (-DALITOK_SIMT, tests/simt/simt.h). PTX-only instructions are reached through the wrappers below, so a kernel is
// written once and its source is the one that the tests run.
//
// Kernels are static or live in an anonymous namespace (the emulation finds their static __shared__ arrays that way).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef ALITOK_SIMT
#include "simt.h"  // found through -Itests/simt; the same names as below, emulated
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// kernel: a kernel function, in parentheses when its template arguments contain commas.
#define ALITOK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                            \
  do {                                                                                           \
    kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ALITOK_CUDA_CHECK(cudaGetLastError());                                                       \
  } while (0)

// As ALITOK_LAUNCH, for a kernel that may begin before the one ahead of it on its stream has ended (programmatic
// dependent launch, from sm_90 on). Until wait_for_kernel_ahead() it may read only what no kernel writes, such as
// weights, and write nothing.
#define ALITOK_LAUNCH_EARLY(kernel, grid, block, shared_bytes, stream, ...) \
  ::alitok::launch_clusters(kernel, 1, (grid), (block), (shared_bytes), stream, __VA_ARGS__)

// The same for clusters of `cluster` blocks, 1 to 8, that follow one another in direction x: blocks that run at the same
// time and read one another's shared memory. From sm_90 on; for earlier devices such a kernel is compiled without a body.
#define ALITOK_LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  ::alitok::launch_clusters(kernel, (cluster), (grid), (block), (shared_bytes), stream, __VA_ARGS__)

// The dynamic shared memory of a kernel, 128-byte aligned: `ALITOK_DYNAMIC_SHARED(unsigned char, smem);`
#define ALITOK_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char alitok_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(alitok_dynamic_shared)

namespace alitok {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copy Bytes (4, 8 or 16, both pointers so aligned) from global to shared memory behind the thread's back; where
// `valid` is false write zeros and do not read. Visible to this thread after commit and wait, to others after a
// barrier too.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
  const int source_bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
  cp_async<16>(shared, global, valid);
}

// Until here a kernel of ALITOK_LAUNCH_EARLY may run beside the one ahead; behind it, all that one wrote is there.
__device__ __forceinline__ void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel behind this one may begin as soon as every block has come here or ended.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The number of this block in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of a cluster meet; what they wrote to shared memory before is there for the others. Without
// .aligned, a warp may come here in parts, as behind a loop that its lanes leave one after the other.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// What another block of the cluster has where this one has `mine` in its dynamic shared memory. It must have come to a
// cluster_sync before, and must come to one more afterwards, so that it does not end.
__device__ __forceinline__ uint32_t address_in_block(const void* mine, unsigned rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(rank));
  return address;
}
__device__ __forceinline__ float4 load_from_block(const float4* mine, unsigned rank) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address_in_block(mine, rank))
               : "memory");
  return x;
}
__device__ __forceinline__ float load_from_block(const float* mine, unsigned rank) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address_in_block(mine, rank)) : "memory");
  return x;
}

// 16 bytes that are read once and that no kernel writes, past the first-level cache, or zeros where not `valid`. Stays
// before a wait that follows it (loads of read-only memory, ld.global.nc, do not).
__device__ __forceinline__ uint4 stream16(const void* global, bool valid) {
  uint4 bits;
  asm volatile(
      "{\n.reg .pred valid;\nsetp.ne.b32 valid, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@valid ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(bits.x), "=&r"(bits.y), "=&r"(bits.z), "=&r"(bits.w)
      : "l"(global), "r"(static_cast<int>(valid))
      : "memory");
  return bits;
}

// Fetch the 128 bytes at an address into the second-level cache, if they are not there: a hint.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most Pending of this thread's most recent groups are still under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// A read that may race with atomics on the same address: some value that was there, past the first-level cache.
__device__ __forceinline__ unsigned long long relaxed_load(const unsigned long long* global) {
  unsigned long long value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(global) : "memory");
  return value;
}

// Load 2 or 4 matrices of 8 x 8 16-bit elements. Lane 8 i + r gives the 16-byte aligned address of row r of matrix i
// (x2: lanes 16..31 give valid addresses that are not used). Register i of lane l receives elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4 of matrix i, or of column l / 4 for the _trans forms.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// d (16 x 8, float) += a (16 x 16, row) b (16 x 8, column), T = __nv_bfloat16 or __half. With g = lane / 4 and
// t = lane % 4 a lane holds, two elements to a register,
//   a[0] = A[g][2t..], a[1] = A[g + 8][2t..], a[2] = A[g][2t + 8..], a[3] = A[g + 8][2t + 8..]
//   b[0] = B[2t..][g], b[1] = B[2t + 8..][g]
//   d[0], d[1] = D[g][2t], D[g][2t + 1];  d[2], d[3] = D[g + 8][2t], D[g + 8][2t + 1]
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (16 x 8, float) += a (16 x 8, row) b (8 x 8, column), tf32 inputs from to_tf32(). With g and t as above:
//   a[0] = A[g][t], a[1] = A[g + 8][t], a[2] = A[g][t + 4], a[3] = A[g + 8][t + 4];  b[0] = B[t][g], b[1] = B[t + 4][g]
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Nearest tf32 (10 bits of mantissa), ties away from zero, as a bit pattern that is also a valid float.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// 2^x to two units in the last place, denormal results flushed to zero; 0 at -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace alitok
#endif  // ALITOK_SIMT

#define ALITOK_CUDA_CHECK(expression) ::alitok::cuda_check((expression), #expression)

namespace alitok {

inline void cuda_check(cudaError_t status, const char* expression) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(expression) + ": " + cudaGetErrorString(status));
  }
}

// Whether the current device has what came with sm_90: clusters, and kernels that begin early.
inline bool has_clusters() {
  int device = 0, major = 0;
  ALITOK_CUDA_CHECK(cudaGetDevice(&device));
  ALITOK_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 9;
}

#ifndef ALITOK_SIMT
// Whether kernels of ALITOK_LAUNCH_EARLY do begin early on the current device; ALITOK_EARLY_LAUNCH=0 turns it off.
inline bool early_launch() {
  static const bool wanted = [] {
    const char* value = std::getenv("ALITOK_EARLY_LAUNCH");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  return wanted && has_clusters();
}

template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes,
                     void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (early_launch()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  ALITOK_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}
#endif

// Above 48 KiB a kernel must ask for its dynamic shared memory. GPUs differ: sm_80 has 163 KiB for a block, sm_90 227,
// sm_86, sm_89 and sm_120 have 99.
template <class Kernel>
void allow_shared_bytes(Kernel* kernel, size_t bytes) {
  if (bytes > 48 * 1024) {
    int device = 0, most = 0;
    ALITOK_CUDA_CHECK(cudaGetDevice(&device));
    ALITOK_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (bytes > static_cast<size_t>(most)) {
      throw std::runtime_error("shared memory: expected a GPU with " + std::to_string(bytes) +
                               " bytes for a block, as this dtype and size of heads need, got one with " +
                               std::to_string(most));
    }
    ALITOK_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }
}

// Two floats rounded to T and packed into one register, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t bits);

template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t bits) {
  __nv_bfloat162 pair;
  memcpy(&pair, &bits, 4);
  return __bfloat1622float2(pair);
}

template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, 4);
  return __half22float2(pair);
}

}  // namespace alitok
