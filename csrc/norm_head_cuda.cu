// A warp owns two or four outputs, and a lane the same inputs of each of them. Their weights are asked for before
// anything else and go to registers, so that they are on their way while the kernel ahead still runs; its rows come to
// shared memory when it has ended, a few at a time, without a thread that waits for the first of them.
//
// Rows are not normalised before the product. The norm's weight is multiplied into the weights, and the sums by
// 1 / rms at the end, which is known by then: behind the wait for the kernel ahead each instruction counts. The same
// numbers are rounded as often as in the definition, elsewhere.
//
// All sums are in an order of their own, whatever rows lie beside: inputs of a lane from the first to the last, then
// lanes that are 16, 8, 4, 2 and 1 apart.
#include <algorithm>

#include "cuda_element.h"
#include "norm_head.h"

namespace alitok {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStep = 32 * 4;    // inputs that a warp reads at a time
constexpr int kMostHeld = 16;    // rows in shared memory: at the widest they fit on GPUs that have 99 KiB for a block
constexpr int kLeastGroup = 4;   // of more rows than that, several groups are held
constexpr int kSquareParts = 2;  // warps that share the squares of a row

__device__ __forceinline__ float4 as_floats(const uint4& bits) {
  float4 floats;
  memcpy(&floats, &bits, sizeof(floats));
  return floats;
}

__device__ __forceinline__ void add_products(float& sum, const float4& a, const float4& b) {
  sum += a.x * b.x;
  sum += a.y * b.y;
  sum += a.z * b.z;
  sum += a.w * b.w;
}

// The sum over a warp of each of kCount numbers, a power of two: lane l gets that of number l * kCount / 32.
template <int kOffset = 16, int kCount>
__device__ __forceinline__ float sum_each(const float (&number)[kCount]) {
  if constexpr (kCount == 1) {
    float sum = number[0];
#pragma unroll
    for (int offset = kOffset; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  } else {
    const bool upper = (threadIdx.x & kOffset) != 0;  // these lanes keep the second half of the numbers
    float half[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float low = number[i], high = number[i + kCount / 2];
      half[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kOffset);
    }
    return sum_each<kOffset / 2>(half);
  }
}

// A block beside one of the kernel ahead, of as many registers, where kernels begin early and the weights leave room.
template <int kSteps, int kOutputs>
#if __CUDA_ARCH__ >= 900
constexpr int kBeside = kSteps * kOutputs <= 24 ? 2 : 1;
#else
constexpr int kBeside = 1;
#endif

// kRows at a time, of kSteps * kStep inputs at most: zeros lie behind shorter ones.
template <int kSteps, int kOutputs, int kRows>
__global__ void __launch_bounds__(kThreads, kBeside<kSteps, kOutputs>) norm_head_kernel(const NormHeadParams p) {
  constexpr int kHeld = kRows < kLeastGroup ? kRows : kMostHeld, kGroups = kHeld / kRows;
  constexpr int kInputs = kSteps * kStep, kResults = kRows * kOutputs;
  static_assert(kRows * kSquareParts <= kWarps && kSteps % kSquareParts == 0 && kHeld % kRows == 0);
  ALITOK_DYNAMIC_SHARED(float, shared);  // the norm's weight and kHeld rows of x, kInputs numbers each
  __shared__ float squares[kWarps];
  let_next_kernel_begin();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int width = static_cast<int>(p.width), rows = static_cast<int>(p.rows);
  const int64_t first = (int64_t{blockIdx.x} * kWarps + warp) * kOutputs;

  float4 weight[kSteps][kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const float* row = p.weight + (first + o) * width + 4 * lane;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      weight[s][o] = as_floats(stream16(row + s * kStep, 4 * lane + s * kStep < width && first + o < p.outputs));
    }
  }
  for (int i = 4 * threadIdx.x; i < kInputs; i += 4 * kThreads) {
    cp_async16(shared + i, p.norm_weight + i, i < width);
  }
  // Of the result that this lane writes: which row of kRows, and which output.
  const int result_row = lane * kResults / 32 / kOutputs;
  const int64_t output = first + lane * kResults / 32 % kOutputs;
  const bool writes = lane % (32 / kResults) == 0 && output < p.outputs;
  const float bias = writes && p.bias != nullptr ? p.bias[output] : 0.0f;
  wait_for_kernel_ahead();

  float* held = shared + kInputs;
  const auto fetch = [&](int begin) {  // a group of rows to its place, unless there are none
    constexpr int kParts = kWarps / kRows;
    const int row = warp / kParts, input = warp % kParts * kStep + 4 * lane;
    float* to = held + (begin % kHeld + row) * kInputs + input;
    const float* from = p.x + (begin + row) * width + input;
#pragma unroll
    for (int s = 0; s < kSteps; s += kParts) {
      if (begin >= rows || warp % kParts + s >= kSteps) break;
      cp_async16(to + s * kStep, from + s * kStep, begin + row < rows && input + s * kStep < width);
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) fetch(group * kRows);
  cp_async_wait<kGroups - 1>();
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const float4 norm = *reinterpret_cast<const float4*>(shared + 4 * lane + s * kStep);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      float4& w = weight[s][o];
      w = make_float4(w.x * norm.x, w.y * norm.y, w.z * norm.z, w.w * norm.w);
    }
  }

#pragma unroll 1
  for (int begin = 0; begin < rows; begin += kRows) {
    if (begin > 0) {
      cp_async_wait<kGroups - 1>();
      __syncthreads();
    }
    const float* x = held + begin % kHeld * kInputs + 4 * lane;
    if (warp < kRows * kSquareParts) {
      float sum = 0;
#pragma unroll
      for (int s = 0; s < kSteps; s += kSquareParts) {
        const int step = s + warp % kSquareParts;
        const float4 value = *reinterpret_cast<const float4*>(x + warp / kSquareParts * kInputs + step * kStep);
        add_products(sum, value, value);
      }
      sum = warp_sum(sum);
      if (lane == 0) squares[warp] = sum;
    }

    float sums[kResults] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 value = *reinterpret_cast<const float4*>(x + r * kInputs + s * kStep);
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) add_products(sums[r * kOutputs + o], weight[s][o], value);
      }
    }
    const float sum = sum_each(sums);
    __syncthreads();  // the squares are there, and the rows have been read
    if (writes && begin + result_row < rows) {
      float square = 0;
#pragma unroll
      for (int part = 0; part < kSquareParts; ++part) square += squares[result_row * kSquareParts + part];
      p.out[(begin + result_row) * p.outputs + output] = sum * rsqrtf(square / width + p.norm_eps) + bias;
    }
    fetch(begin + kHeld);
  }
  cp_async_wait<0>();  // empty groups
}

template <int kSteps, int kOutputs, int kRows>
void launch(const NormHeadParams& p, void* stream) {
  const auto kernel = norm_head_kernel<kSteps, kOutputs, kRows>;
  const int64_t held = (std::min<int64_t>(p.rows, kMostHeld) + kRows - 1) / kRows * kRows;
  const size_t bytes = (1 + held) * kSteps * kStep * sizeof(float);
  constexpr int64_t kOwned = kWarps * kOutputs;
  allow_shared_bytes(kernel, bytes);
  ALITOK_LAUNCH_EARLY(kernel, dim3(static_cast<unsigned>((p.outputs + kOwned - 1) / kOwned)), dim3(kThreads), bytes,
                      stream, p);
}

// Four outputs to a warp, which read each number of x once. Where their weights took so many registers that no block
// fitted beside one of the kernel ahead, two, unless there are rows enough for the reading to matter more.
template <int kSteps>
void launch_for_rows(const NormHeadParams& p, void* stream) {
  constexpr int kFew = kSteps <= 6 ? 4 : 2;
  if (p.rows <= 2) return launch<kSteps, kFew, 2>(p, stream);
  if (p.rows <= 8) return launch<kSteps, kFew, 4>(p, stream);
  launch<kSteps, 4, 4>(p, stream);
}

}  // namespace

void norm_head_cuda(const NormHeadParams& p, void* stream) {
  if (p.width <= 6 * kStep) return launch_for_rows<6>(p, stream);
  if (p.width <= 8 * kStep) return launch_for_rows<8>(p, stream);
  launch_for_rows<10>(p, stream);
}

}  // namespace alitok
