// Small kernels that show what the emulation computes and what it catches; test_simt.py picks one by number.
#include "case.h"
#include "cuda_kernel.h"

namespace {

using namespace alitok;

__global__ void block_sum(const float* x, float* y, int n) {
  __shared__ float part[64];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  part[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  for (int step = blockDim.x / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) y[blockIdx.x] = part[0];
}

__global__ void block_sum_without_barrier(const float* x, float* y) {
  __shared__ float part[64];
  part[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < 64; ++i) sum += part[i];
    y[0] = sum;
  }
}

// C (16, 8) = A (16, 16) B (16, 8) + start: cp.async, ldmatrix plain and transposed, mma.
template <class T, bool Wait>
__global__ void small_matmul(const T* a, const T* b, float start, float* c) {
  ALITOK_DYNAMIC_SHARED(T, smem);
  T* shared_a = smem;
  T* shared_b = smem + 16 * 16;
  const int lane = threadIdx.x;
  cp_async16(shared_a + 8 * lane, a + 8 * lane);
  cp_async16(shared_b + 8 * lane, b + 8 * lane, lane < 16);  // then 128 zeros
  cp_async_commit();
  if constexpr (Wait) cp_async_wait<0>();
  __syncwarp();
  uint32_t fa[4], fb[2];
  ldmatrix_x4(fa, shared_a + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x2_trans(fb, shared_b + lane % 16 * 8);
  const float first = static_cast<float>(shared_b[128 + 4 * lane]) + start;  // zero and start
  float d[4] = {first, first, first, first};
  mma_m16n8k16<T>(d, fa, fb);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
  if constexpr (!Wait) cp_async_wait<0>();
}

__global__ void small_matmul_tf32(const float* a, const float* b, float start, float* c) {  // A (16, 8), B (8, 8)
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t fa[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                          to_tf32(a[(g + 8) * 8 + t + 4])};
  const uint32_t fb[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
  float d[4] = {start, start, start, start};
  mma_m16n8k8_tf32(d, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

__global__ void warp_functions(const int* x, int* y) {
  const int lane = threadIdx.x % 32, v = x[threadIdx.x];
  int* out = y + 8 * threadIdx.x;
  out[0] = __shfl_xor_sync(0xffffffffu, v, 5);
  out[1] = __shfl_down_sync(0xffffffffu, v, 3, 16);
  out[2] = static_cast<int>(__ballot_sync(0xffffffffu, v > 0));
  out[3] = __reduce_max_sync(0xffffffffu, v);
  if (lane < 8) {
    out[4] = __shfl_sync(0xffu, v, 7);
  } else {
    out[4] = __reduce_add_sync(0xffffff00u, v);
  }
  out[5] = static_cast<int>(__match_any_sync(0xffffffffu, v));
  out[6] = __syncthreads_count(v > 0);
  out[7] = atomicAdd(y + 8 * 64, v) == -1 ? 1 : 0;
}

__global__ void round_trip(const float* x, uint16_t* bf16, uint16_t* fp16, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t a = pack2<__nv_bfloat16>(x[i], 0.0f), b = pack2<__half>(x[i], 0.0f);
    bf16[i] = static_cast<uint16_t>(a);
    fp16[i] = static_cast<uint16_t>(b);
  }
}

__global__ void write_past_shared(float* y) {
  ALITOK_DYNAMIC_SHARED(float, smem);
  smem[threadIdx.x + 1] = 0.0f;
  y[0] = 0.0f;
}
__global__ void write_past_static_shared(float* y, int n) {
  __shared__ float part[33];
  part[threadIdx.x + n] = 0.0f;
  y[0] = part[1];
}
__global__ void read_past_global(const float* x, float* y, int n) { y[0] = x[n]; }
__global__ void barrier_in_branch() {
  if (threadIdx.x < 16) __syncthreads();
}
__global__ void misaligned(const float* x, float* y) { y[0] = reinterpret_cast<const float4*>(x + 1)->x; }
// y[rank] = the sum of what the blocks of a cluster hold.
template <bool Wait, bool Stay>
__global__ void cluster_sum(const float* x, float* y) {
  ALITOK_DYNAMIC_SHARED(float, smem);
  smem[threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x];
  if constexpr (Wait) cluster_sync();
  float sum = 0;
  if (Stay || blockIdx.x != 0) {
    for (unsigned block = 0; block < 3; ++block) sum += load_from_block(smem + threadIdx.x, block);
  }
  y[blockIdx.x * 32 + threadIdx.x] = 100 * cluster_rank() + sum;
  if constexpr (Stay) cluster_sync();
}
__global__ void last_writer(float* y) { y[0] = static_cast<float>(threadIdx.x); }

}  // namespace

void run_case(simt::Case& test) {
  const int64_t n = test.integer("n");
  const auto* x = test.input<float>("x");
  const auto start = static_cast<float>(test.has("start") ? test.number("start") : 0.0);
  switch (test.integer("kernel")) {
    case 0:
      ALITOK_LAUNCH(block_sum, (n + 63) / 64, 64, 0, nullptr, x, test.output<float>("y", (n + 63) / 64), n);
      break;
    case 1: ALITOK_LAUNCH(block_sum_without_barrier, 1, 64, 0, nullptr, x, test.output<float>("y", 1)); break;
    case 2:
      ALITOK_LAUNCH((small_matmul<__nv_bfloat16, true>), 1, 32, 1024, nullptr, test.input<__nv_bfloat16>("a"),
                    test.input<__nv_bfloat16>("b"), start, test.output<float>("y", 128));
      break;
    case 3:
      ALITOK_LAUNCH((small_matmul<__half, true>), 1, 32, 1024, nullptr, test.input<__half>("a"),
                    test.input<__half>("b"), start, test.output<float>("y", 128));
      break;
    case 4:
      ALITOK_LAUNCH((small_matmul<__half, false>), 1, 32, 1024, nullptr, test.input<__half>("a"),
                    test.input<__half>("b"), start, test.output<float>("y", 128));
      break;
    case 5:
      ALITOK_LAUNCH(small_matmul_tf32, 1, 32, 0, nullptr, test.input<float>("a"), test.input<float>("b"), start,
                    test.output<float>("y", 128));
      break;
    case 6: ALITOK_LAUNCH(warp_functions, 1, 64, 0, nullptr, test.input<int>("a"), test.inout<int>("y")); break;
    case 7:
      ALITOK_LAUNCH(round_trip, 1, 32, 0, nullptr, x, test.output<uint16_t>("bf16", n),
                    test.output<uint16_t>("fp16", n), n);
      break;
    case 8: ALITOK_LAUNCH(write_past_shared, 1, 32, 128, nullptr, test.output<float>("y", 1)); break;
    case 9: ALITOK_LAUNCH(write_past_static_shared, 1, 32, 0, nullptr, test.output<float>("y", 1), n); break;
    case 10: ALITOK_LAUNCH(read_past_global, 1, 1, 0, nullptr, x, test.output<float>("y", 1), n); break;
    case 11: ALITOK_LAUNCH(barrier_in_branch, 1, 32, 0, nullptr); break;
    case 12: ALITOK_LAUNCH(misaligned, 1, 1, 0, nullptr, x, test.output<float>("y", 1)); break;
    case 13: ALITOK_LAUNCH(last_writer, 1, 64, 0, nullptr, test.output<float>("y", 1)); break;
    case 14: ALITOK_LAUNCH(write_past_shared, 1, 32, 64 * 1024, nullptr, test.output<float>("y", 1)); break;
    case 15: alitok::allow_shared_bytes(write_past_shared, simt::kMaxSharedBytes + 1); break;
    case 16:
      ALITOK_LAUNCH_CLUSTERS((cluster_sum<true, true>), 3, 6, 32, 128, nullptr, x, test.output<float>("y", 192));
      break;
    case 17:
      ALITOK_LAUNCH_CLUSTERS((cluster_sum<false, true>), 3, 3, 32, 128, nullptr, x, test.output<float>("y", 96));
      break;
    case 18:
      ALITOK_LAUNCH_CLUSTERS((cluster_sum<true, false>), 3, 3, 32, 128, nullptr, x, test.output<float>("y", 96));
      break;
    case 19: ALITOK_LAUNCH_CLUSTERS(barrier_in_branch, 3, 4, 32, 0, nullptr); break;
    default: simt::fail("no such kernel");
  }
}
