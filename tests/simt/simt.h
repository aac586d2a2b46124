// The part of CUDA that kernels here use, by the same names, on top of engine.h. README.md lists what is missing.
#pragma once

#include <cmath>

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("simt_shared")))
#define __grid_constant__

#define ALITOK_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::simt::engine.block->dynamic_shared)

#define ALITOK_LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared_bytes, stream, ...)                               \
  do {                                                                                                                \
    auto* alitok_kernel = kernel;                                                                                     \
    (void)(stream);                                                                                                   \
    ::simt::launch(#kernel, reinterpret_cast<const void*>(alitok_kernel), (cluster), (grid), (block), (shared_bytes), \
                   ::simt::call(alitok_kernel)(__VA_ARGS__));                                                         \
  } while (0)
#define ALITOK_LAUNCH(kernel, ...) ALITOK_LAUNCH_CLUSTERS(kernel, 1, __VA_ARGS__)

// Kernels run one after the other here.
#define ALITOK_LAUNCH_EARLY ALITOK_LAUNCH

namespace simt {

// Arguments are copied when a kernel is launched, as on a device.
template <class... Parameters>
auto call(void (*kernel)(Parameters...)) {
  return [=](Parameters... arguments) { return std::function<void()>([=] { kernel(arguments...); }); };
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace simt

// ---- runtime ---------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > simt::kMaxSharedBytes) return cudaErrorInvalidValue;
  simt::engine.allowed_shared[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // The memory of the smallest device that kernels are written for, and the instructions of a later one.
  *value = static_cast<int>(simt::kMaxSharedBytes);
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = 9;
  if (attribute == cudaDevAttrMultiProcessorCount) *value = 128;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}

// ---- vector and 16-bit types -----------------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const uint32_t u = simt::bits_as<uint32_t>(x);
    bits = x != x ? uint16_t{0x7fff} : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return simt::bits_as<float>(uint32_t{bits} << 16); }
};

// Rounding to nearest even in integer arithmetic: _Float16 is not in every C++ compiler.
struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) {
    const uint32_t u = simt::bits_as<uint32_t>(x);
    const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    uint32_t h;
    if (magnitude > 0x7f800000) {
      h = 0x7fff;
    } else if (magnitude >= 0x477ff000) {  // 65520 and more round to infinity
      h = 0x7c00;
    } else if (magnitude < 0x38800000) {  // below 2^-14: denormal, a multiple of 2^-24
      h = static_cast<uint32_t>(std::nearbyint(std::ldexp(simt::bits_as<float>(magnitude), 24)));
    } else {
      h = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    bits = static_cast<uint16_t>(sign | h);
  }
  explicit operator float() const {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023u;
    float x = std::ldexp(static_cast<float>(fraction), -24);
    if (exponent == 31)
      x = fraction ? std::nanf("") : INFINITY;
    else if (exponent > 0)
      x = std::ldexp(static_cast<float>(1024 + fraction), static_cast<int>(exponent) - 25);
    return bits & 0x8000 ? -x : x;
  }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {static_cast<float>(v.x), static_cast<float>(v.y)}; }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {static_cast<float>(v.x), static_cast<float>(v.y)}; }

// ---- arithmetic ------------------------------------------------------------------------------------------------

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// Opaque to the compiler, so that they are never contracted into a fused multiply-add.
__attribute__((noinline)) inline float __fmul_rn(float a, float b) { return a * b; }
__attribute__((noinline)) inline float __fadd_rn(float a, float b) { return a + b; }
__attribute__((noinline)) inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }

inline int __float_as_int(float x) { return simt::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits_as<double>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T x) {
  *p = x;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}

// ---- threads ---------------------------------------------------------------------------------------------------

inline void __syncthreads() { simt::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline int __syncthreads_count(int predicate) {
  static int count;
  simt::Untracked untracked;  // the barriers order what the kernel does; `count` is ours
  simt::sync_block();
  count = 0;
  simt::sync_block();
  count += predicate != 0;
  simt::sync_block();
  return count;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(predicate == 0) == 0; }

namespace simt {

template <class T, class Source>
T shuffle(unsigned mask, T value, int width, Source source) {
  const Convergence::Slot* slots = exchange(kShuffle, mask, value);
  const int base = lane() & ~(width - 1), from = source(lane() - base);
  if (from < 0 || from >= width) return value;
  if (!(mask >> (base + from) & 1)) fail("a shuffle reads lane %d, which is not in the mask %08x", base + from, mask);
  if (thread() - lane() + base + from >= engine.threads) fail("a shuffle reads beyond a partial warp");
  return value_of<T>(slots, base + from);
}

template <class T, class Combine>
T reduce(Instruction instruction, unsigned mask, T value, Combine combine) {
  const Convergence::Slot* slots = exchange(instruction, mask, value);
  bool first = true;
  T result{};
  for (int i = 0; i < kWarp && thread() - lane() + i < engine.threads; ++i) {
    if (!(mask >> i & 1)) continue;
    const T other = value_of<T>(slots, i);
    result = first ? other : combine(result, other);
    first = false;
  }
  return result;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle(mask, value, width, [=](int) { return source & (width - 1); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return simt::shuffle(mask, value, width, [=](int lane) { return lane ^ lane_mask; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle(mask, value, width, [=](int lane) { return lane + static_cast<int>(delta); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle(mask, value, width, [=](int lane) { return lane - static_cast<int>(delta); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned mine = predicate ? 1u << simt::lane() : 0u;
  return simt::reduce(simt::kVote, mask, mine, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T>
T __reduce_add_sync(unsigned mask, T x) {
  return simt::reduce(simt::kReduce, mask, x, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T x) {
  return simt::reduce(simt::kReduce, mask, x, [](T a, T b) { return min(a, b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T x) {
  return simt::reduce(simt::kReduce, mask, x, [](T a, T b) { return max(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x) {
  return simt::reduce(simt::kReduce, mask, x, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned x) {
  return simt::reduce(simt::kReduce, mask, x, [](unsigned a, unsigned b) { return a & b; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T x) {
  const simt::Convergence::Slot* slots = simt::exchange(simt::kMatch, mask, x);
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && simt::value_of<T>(slots, i) == x) same |= 1u << i;
  }
  return same;
}

// ---- atomics ---------------------------------------------------------------------------------------------------

namespace simt {

// Relaxed, as on a device; a real atomic, so that the race detector knows it from a plain access.
template <class T, class Update>
T atomic(T* target, Update update) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  Bits* bits = reinterpret_cast<Bits*>(target);
  const T old = bits_as<T>(__atomic_load_n(bits, __ATOMIC_RELAXED));
  __atomic_store_n(bits, bits_as<Bits>(static_cast<T>(update(old))), __ATOMIC_RELAXED);
  return old;  // fibers only switch at barriers: nothing comes between load and store
}

}  // namespace simt

template <class T>
T atomicAdd(T* p, T x) {
  return simt::atomic(p, [=](T old) { return old + x; });
}
template <class T>
T atomicSub(T* p, T x) {
  return simt::atomic(p, [=](T old) { return old - x; });
}
template <class T>
T atomicMin(T* p, T x) {
  return simt::atomic(p, [=](T old) { return x < old ? x : old; });
}
template <class T>
T atomicMax(T* p, T x) {
  return simt::atomic(p, [=](T old) { return x > old ? x : old; });
}
template <class T>
T atomicAnd(T* p, T x) {
  return simt::atomic(p, [=](T old) { return old & x; });
}
template <class T>
T atomicOr(T* p, T x) {
  return simt::atomic(p, [=](T old) { return old | x; });
}
template <class T>
T atomicXor(T* p, T x) {
  return simt::atomic(p, [=](T old) { return old ^ x; });
}
template <class T>
T atomicExch(T* p, T x) {
  return simt::atomic(p, [=](T) { return x; });
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return simt::atomic(p, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
template <class T>
T atomicCAS(T* p, T expected, T x) {
  return simt::atomic(p, [=](T old) { return old == expected ? x : old; });
}

// ---- cuda_kernel.h's wrappers ----------------------------------------------------------------------------------

namespace alitok {

template <int Bytes>
void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
  simt::copy_async(shared, global, Bytes, valid);
}
inline void cp_async16(void* shared, const void* global, bool valid = true) { cp_async<16>(shared, global, valid); }
inline void wait_for_kernel_ahead() {}
inline void let_next_kernel_begin() {}
inline void prefetch(const void*) {}
inline uint4 stream16(const void* global, bool valid) {
  return valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
}
inline unsigned cluster_rank() { return simt::rank_in_cluster(); }
inline void cluster_sync() { simt::sync_cluster(); }
inline float4 load_from_block(const float4* mine, unsigned rank) {
  return *static_cast<const float4*>(simt::shared_of_block(mine, rank));
}
inline float load_from_block(const float* mine, unsigned rank) {
  return *static_cast<const float*>(simt::shared_of_block(mine, rank));
}

inline void cp_async_commit() { simt::commit_copies(); }
template <int Pending>
void cp_async_wait() {
  simt::wait_copies(Pending);
}

inline unsigned long long relaxed_load(const unsigned long long* global) {
  return __atomic_load_n(global, __ATOMIC_RELAXED);
}

template <int Matrices, bool Transposed>
void ldmatrix(uint32_t (&r)[Matrices], const void* row) {
  struct Row {
    uint16_t elements[8];
  } mine{};
  const int lane = simt::lane();
  if (reinterpret_cast<uintptr_t>(row) % 16) simt::fail("ldmatrix: row address not a multiple of 16");
  if (lane < 8 * Matrices) simt::copy_words<Row>(&mine, row);
  // Each matrix is one pass over the banks when its rows lie in different 16-byte columns of the 128-byte bank line.
  const uint32_t column = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row) >> 4 & 7);
  const auto* columns = simt::exchange(simt::kLdmatrix, 0xffffffffu, column);
  if (lane % 8 == 0 && lane < 8 * Matrices) {
    int uses[8] = {}, most = 0;
    for (int i = 0; i < 8; ++i) most = std::max(most, ++uses[simt::value_of<uint32_t>(columns, lane + i)]);
    simt::Untracked untracked;
    simt::engine.bank_conflicts += static_cast<uint64_t>(most - 1);
  }
  const auto* slots = simt::exchange(simt::kLdmatrix, 0xffffffffu, mine);
  for (int i = 0; i < Matrices; ++i) {
    const int g = lane / 4, t = 2 * (lane % 4);
    const Row first = simt::value_of<Row>(slots, 8 * i + (Transposed ? t : g));
    const Row second = simt::value_of<Row>(slots, 8 * i + (Transposed ? t + 1 : g));
    r[i] = first.elements[Transposed ? g : t] | uint32_t{second.elements[Transposed ? g : t + 1]} << 16;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix<4, false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix<4, true>(r, row); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { ldmatrix<2, false>(r, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { ldmatrix<2, true>(r, row); }

struct MmaOperands {
  uint32_t a[4], b[2];
};

// One step of a matrix unit: sum + x[0] y[0] + ..., rounded as the units of sm_80 do (Fasi, Higham, Mikaitis and
// Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"): products are exact, every term is cut off one bit below
// the 24 bits that a float would have at the largest exponent of all, the exact sum of these is cut off to a float. The
// exponent of a product is the sum of its factors' exponents. Later units keep more bits and take more products a step.
template <int kProducts>
float multiply_step(float sum, const float* x, const float* y) {
  const auto exponent = [](float v) {  // of the leading bit, that of subnormal numbers too being -126
    return std::max<int>(simt::bits_as<uint32_t>(v) >> 23 & 255, 1) - 127;
  };
  double terms[kProducts + 1];
  int largest = sum == 0 ? -400 : exponent(sum);
  terms[kProducts] = sum;
  for (int k = 0; k < kProducts; ++k) {
    terms[k] = static_cast<double>(x[k]) * y[k];
    if (terms[k] != 0) largest = std::max(largest, exponent(x[k]) + exponent(y[k]));
  }
  double total = 0;
  for (const double term : terms) total += term;
  if (!std::isfinite(total)) return static_cast<float>(total);

  const auto power_of_two = [](int e) { return simt::bits_as<double>(uint64_t(1023 + e) << 52); };
  const double unit = power_of_two(std::max(largest - 24, -149)), inverse = 1 / unit;
  int64_t units = 0;
  for (const double term : terms) units += static_cast<int64_t>(term * inverse);
  const double exact = static_cast<double>(units) * unit;
  const float nearest = static_cast<float>(exact);
  const bool beyond = std::abs(static_cast<double>(nearest)) > std::abs(exact);
  return beyond && std::isfinite(nearest) ? std::nextafter(nearest, 0.0f) : nearest;
}

// D (16 x 8) += A B with kDepth columns of A, kStep of them at a time. element(registers, index) is number `index` of
// a lane's elements in a row of A or column of B; a lane holds kLaneElements neighbouring ones, then those kDepth / 2
// further on.
template <int kDepth, int kStep, int kLaneElements, class Element>
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Element element) {
  const auto* slots = simt::exchange(simt::kMma, 0xffffffffu, MmaOperands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  float rows[2][kDepth], columns[2][kDepth];
  for (int lane = 0; lane < 4; ++lane) {
    const MmaOperands left = simt::value_of<MmaOperands>(slots, 4 * g + lane);
    for (int half = 0; half < 2; ++half) {
      const MmaOperands right = simt::value_of<MmaOperands>(slots, 4 * (2 * t + half) + lane);
      for (int i = 0; i < 2 * kLaneElements; ++i) {
        const int k = i / kLaneElements * (kDepth / 2) + lane * kLaneElements + i % kLaneElements;
        rows[half][k] = element(left.a[2 * (i / kLaneElements) + half], i % kLaneElements);
        columns[half][k] = element(right.b[i / kLaneElements], i % kLaneElements);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < kDepth; k += kStep) {
      d[i] = multiply_step<kStep>(d[i], rows[i / 2] + k, columns[i % 2] + k);
    }
  }
}

// The lane layouts are those that cuda_kernel.h documents.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<16, 8, 2>(d, a, b, [](uint32_t pair, int odd) {
    T x;
    x.bits = static_cast<uint16_t>(pair >> (16 * odd));
    return static_cast<float>(x);
  });
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<8, 4, 1>(d, a, b, [](uint32_t bits, int) {  // the device ignores the low 13 bits
    return simt::bits_as<float>(bits & 0xffffe000u);
  });
}

inline uint32_t to_tf32(float x) { return (simt::bits_as<uint32_t>(x) + 0x1000u) & 0xffffe000u; }
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

}  // namespace alitok
