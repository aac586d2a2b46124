// Each weight row is widened once and meets all rows of x. A simple kernel: on the CPU sampling goes through `decode`,
// whose weights are packed for it; this is the same layer on its own.
#include "quantized_linear.h"

#include <algorithm>
#include <array>

#include "element.h"
#include "scratch.h"

namespace alitok {
namespace ALITOK_ISA {
namespace {

struct Int8 {
  using Storage = int8_t;
  static float get(const int8_t* p) { return static_cast<float>(*p); }
};

// The value of each of the 256 codes.
template <class Weight>
std::array<float, 256> table_of() {
  std::array<float, 256> values;
  for (int code = 0; code < 256; ++code) {
    const auto bits = static_cast<uint8_t>(code);
    values[code] = Weight::get(reinterpret_cast<const typename Weight::Storage*>(&bits));
  }
  return values;
}

// In four chains: each addition waits for the one before in its chain, and shorter chains round less.
template <class Type>
float dot(const typename Type::Storage* x, const float* weight, int64_t size) {
  Vec sums[4];
  int64_t i = 0;
  for (; i + 4 * Vec::lanes <= size; i += 4 * Vec::lanes) {
    for (int chain = 0; chain < 4; ++chain) {
      const int64_t at = i + chain * Vec::lanes;
      sums[chain] = fma(Type::load(x + at, Vec::lanes), Vec::load(weight + at), sums[chain]);
    }
  }
  for_vectors(size - i, [&](int64_t offset, int count) {
    sums[0] = fma(Type::load(x + i + offset, count), Vec::load(weight + i + offset, count), sums[0]);
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class Type, class Weight>
void run(const QuantizedLinearParams& p, const Parallel& parallel) {
  using T = typename Type::Storage;
  const T *x = static_cast<const T*>(p.x), *bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out);
  const auto* scales = static_cast<const BFloat16::Storage*>(p.scale);
  const int64_t groups = (p.inputs + kQuantizedLinearGroup - 1) / kQuantizedLinearGroup;
  const std::array<float, 256> values = table_of<Weight>();
  Scratch<FloatBuffer> scratch(parallel, p.outputs, p.inputs);
  parallel(0, p.outputs, 1 + 65536 / (1 + p.inputs * p.rows), [&](int64_t begin, int64_t end) {
    float* row = scratch.take();
    for (int64_t output = begin; output < end; ++output) {
      const uint8_t* codes = static_cast<const uint8_t*>(p.weight) + output * p.inputs;
      for (int64_t group = 0; group < groups; ++group) {
        const float scale = BFloat16::get(scales + output * groups + group);
        const int64_t first = group * kQuantizedLinearGroup;
        for (int64_t i = first; i < std::min(p.inputs, first + kQuantizedLinearGroup); ++i) {
          row[i] = values[codes[i]] * scale;
        }
      }
      for (int64_t r = 0; r < p.rows; ++r) {
        const float added = bias == nullptr ? 0.0f : Type::get(bias + output);
        Type::set(out + r * p.outputs + output, dot<Type>(x + r * p.inputs, row, p.inputs) + added);
      }
    }
  });
}

template <class Type>
void run_for_weight(const QuantizedLinearParams& p, const Parallel& parallel) {
  if (p.weight_dtype == QuantizedLinearDtype::int8) return run<Type, Int8>(p, parallel);
  run<Type, E4m3>(p, parallel);
}

}  // namespace

void quantized_linear_cpu(const QuantizedLinearParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case QuantizedLinearDtype::float32: return run_for_weight<Float32>(p, parallel);
    case QuantizedLinearDtype::bfloat16: return run_for_weight<BFloat16>(p, parallel);
    default: return run_for_weight<Float16>(p, parallel);
  }
}

}  // namespace ALITOK_ISA
}  // namespace alitok
