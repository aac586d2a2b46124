// For the 1 to 16 rows of a step with a small batch, where time goes into the weights: each is read once, 16 to a load,
// by a warp that owns one or two outputs and splits their inputs over its lanes. The rows of x come from the caches.
#include "cuda_element.h"
#include "quantized_linear.h"

namespace alitok {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kVector = 16;  // inputs of a lane at a time
static_assert(kQuantizedLinearGroup % kVector == 0 && 32 * kVector % kQuantizedLinearGroup == 0,
              "a vector shares a scale, and a warp's step is whole groups");

// Where many rows share a weight, two outputs share the rows.
template <int kRows>
constexpr int kOutputs = kRows >= 8 ? 2 : 1;

// `count` of 16 neighbouring elements, zeros behind them.
template <class T>
__device__ __forceinline__ void load(float (&to)[kVector], const T* from, int64_t count, bool aligned) {
  if (aligned && count >= kVector) {
    constexpr int kElements = 16 / sizeof(T);
#pragma unroll
    for (int chunk = 0; chunk < kVector / kElements; ++chunk) {
      T element[kElements];
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from) + chunk);
      memcpy(element, &bits, 16);
#pragma unroll
      for (int e = 0; e < kElements; ++e) to[chunk * kElements + e] = to_float(element[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) to[e] = e < count ? to_float(from[e]) : 0.0f;
  }
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class T, class W, int kRows>
__global__ void __launch_bounds__(kThreads) quantized_linear_kernel(const QuantizedLinearParams p) {
  constexpr int kOwned = kOutputs<kRows>;
  static_assert(kRows * kOwned <= 32, "a lane writes one result");
  const int lane = threadIdx.x % 32;
  const int64_t first_output = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * kOwned;
  const int64_t first_row = int64_t{blockIdx.y} * kRows;
  const T* x = static_cast<const T*>(p.x) + first_row * p.inputs;
  const W* weight = static_cast<const W*>(p.weight) + first_output * p.inputs;
  const int64_t groups = (p.inputs + kQuantizedLinearGroup - 1) / kQuantizedLinearGroup;
  // Of the group that this lane is in; advances with it.
  const __nv_bfloat16* scale =
      static_cast<const __nv_bfloat16*>(p.scale) + first_output * groups + lane * kVector / kQuantizedLinearGroup;
  const bool whole = p.inputs % kVector == 0, x_aligned = whole && is_aligned(p.x);
  const bool weight_aligned = whole && is_aligned(p.weight);

  float sums[kRows][kOwned] = {};
  for (int64_t i = lane * kVector; i < p.inputs; i += 32 * kVector, scale += 32 * kVector / kQuantizedLinearGroup) {
    const int64_t count = p.inputs - i;
    float w[kOwned][kVector];
#pragma unroll
    for (int o = 0; o < kOwned; ++o) {
      const bool exists = first_output + o < p.outputs;
      const float group_scale = exists ? to_float(scale[o * groups]) : 0.0f;
      load(w[o], weight + o * p.inputs + i, exists ? count : 0, weight_aligned);
#pragma unroll
      for (int e = 0; e < kVector; ++e) w[o][e] *= group_scale;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first_row + r >= p.rows) break;
      float inputs[kVector];
      load(inputs, x + r * p.inputs + i, count, x_aligned);
#pragma unroll
      for (int o = 0; o < kOwned; ++o) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) sums[r][o] += inputs[e] * w[o][e];
      }
    }
  }

  float mine = 0;  // lane kOwned * r + o keeps the sum of row r and output o
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int o = 0; o < kOwned; ++o) {
      const float sum = warp_sum(sums[r][o]);
      if (lane == r * kOwned + o) mine = sum;
    }
  }
  const int64_t row = first_row + lane / kOwned, output = first_output + lane % kOwned;
  if (lane >= kRows * kOwned || row >= p.rows || output >= p.outputs) return;
  const float bias = p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[output]);
  static_cast<T*>(p.out)[row * p.outputs + output] = from_float<T>(mine + bias);
}

// A warp for each output: a byte read and sizeof(T) written for a weight.
template <class T, class W>
__global__ void __launch_bounds__(kThreads) widen_kernel(const WidenParams p) {
  const int64_t output = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (output >= p.outputs) return;
  const int64_t groups = (p.inputs + kQuantizedLinearGroup - 1) / kQuantizedLinearGroup;
  const W* weight = static_cast<const W*>(p.weight) + output * p.inputs;
  const __nv_bfloat16* scale = static_cast<const __nv_bfloat16*>(p.scale) + output * groups;
  T* out = static_cast<T*>(p.out) + output * p.inputs;
  const bool whole = p.inputs % kVector == 0, weight_aligned = whole && is_aligned(p.weight);
  const bool out_aligned = whole && is_aligned(p.out);

  constexpr int kStep = 32 * kVector;
  for (int64_t i = threadIdx.x % 32 * kVector; i < p.inputs; i += kStep) {
    const int64_t count = p.inputs - i;
    float value[kVector];
    load(value, weight + i, count, weight_aligned);
    const float group_scale = to_float(scale[i / kQuantizedLinearGroup]);
    alignas(16) T wide[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) wide[e] = from_float<T>(value[e] * group_scale);
    if (out_aligned) {
#pragma unroll
      for (int chunk = 0; chunk < kVector * static_cast<int>(sizeof(T)) / 16; ++chunk) {
        uint4 bits;
        memcpy(&bits, reinterpret_cast<const char*>(wide) + 16 * chunk, 16);
        reinterpret_cast<uint4*>(out + i)[chunk] = bits;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (e < count) out[i + e] = wide[e];
      }
    }
  }
}

template <class T, class W, int kRows>
void launch(const QuantizedLinearParams& p, void* stream) {
  constexpr int64_t kBlock = kWarps * kOutputs<kRows>;
  const dim3 grid(static_cast<unsigned>((p.outputs + kBlock - 1) / kBlock),
                  static_cast<unsigned>((p.rows + kRows - 1) / kRows));
  ALITOK_LAUNCH((quantized_linear_kernel<T, W, kRows>), grid, kThreads, 0, stream, p);
}

template <class T, class W>
void launch_for_rows(const QuantizedLinearParams& p, void* stream) {
  if (p.rows <= 1) return launch<T, W, 1>(p, stream);
  if (p.rows <= 2) return launch<T, W, 2>(p, stream);
  if (p.rows <= 4) return launch<T, W, 4>(p, stream);
  if (p.rows <= 8) return launch<T, W, 8>(p, stream);
  launch<T, W, 16>(p, stream);
}

template <class T>
void launch_for_weight(const QuantizedLinearParams& p, void* stream) {
  if (p.weight_dtype == QuantizedLinearDtype::int8) return launch_for_rows<T, int8_t>(p, stream);
  launch_for_rows<T, e4m3>(p, stream);
}

template <class T>
void widen_to(const WidenParams& p, void* stream) {
  const dim3 grid(static_cast<unsigned>((p.outputs + kWarps - 1) / kWarps));
  if (p.weight_dtype == QuantizedLinearDtype::int8) {
    ALITOK_LAUNCH((widen_kernel<T, int8_t>), grid, kThreads, 0, stream, p);
  } else {
    ALITOK_LAUNCH((widen_kernel<T, e4m3>), grid, kThreads, 0, stream, p);
  }
}

}  // namespace

void widen_cuda(const WidenParams& p, void* stream) {
  switch (p.dtype) {
    case QuantizedLinearDtype::float32: return widen_to<float>(p, stream);
    case QuantizedLinearDtype::bfloat16: return widen_to<__nv_bfloat16>(p, stream);
    case QuantizedLinearDtype::float16: return widen_to<__half>(p, stream);
    default: throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got 8 bits");
  }
}

void quantized_linear_cuda(const QuantizedLinearParams& p, void* stream) {
  switch (p.dtype) {
    case QuantizedLinearDtype::float32: return launch_for_weight<float>(p, stream);
    case QuantizedLinearDtype::bfloat16: return launch_for_weight<__nv_bfloat16>(p, stream);
    case QuantizedLinearDtype::float16: return launch_for_weight<__half>(p, stream);
    default: throw std::invalid_argument("x: expected float32, bfloat16 or float16, got 8 bits");
  }
}

}  // namespace alitok
