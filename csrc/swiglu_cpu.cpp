#include "swiglu.h"

#include "element.h"

namespace alitok {
namespace ALITOK_ISA {
namespace {

template <class Type>
void run(const SwigluParams& p, const Parallel& parallel) {
  using T = typename Type::Storage;
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
  T* out = static_cast<T*>(p.out);
  parallel(0, p.size, 8192, [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t offset, int count) {
      const int64_t i = begin + offset;
      const Vec g = Type::load(gate + i, count);
      Type::store(out + i, g / (Vec(1.0f) + exp(Vec(0.0f) - g)) * Type::load(up + i, count), count);
    });
  });
}

// With s = sigmoid(gate): grad_gate = grad up s (1 + gate (1 - s)), grad_up = grad gate s.
template <class Type>
void run_backward(const SwigluBackwardParams& b, const Parallel& parallel) {
  using T = typename Type::Storage;
  const T *gate = static_cast<const T*>(b.forward.gate), *up = static_cast<const T*>(b.forward.up);
  const T* grad = static_cast<const T*>(b.grad);
  T *grad_gate = static_cast<T*>(b.grad_gate), *grad_up = static_cast<T*>(b.grad_up);
  parallel(0, b.forward.size, 8192, [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t offset, int count) {
      const int64_t i = begin + offset;
      const Vec g = Type::load(gate + i, count), above = Type::load(grad + i, count);
      const Vec sigmoid = Vec(1.0f) / (Vec(1.0f) + exp(Vec(0.0f) - g));
      const Vec slope = sigmoid * fma(g, Vec(1.0f) - sigmoid, Vec(1.0f));
      Type::store(grad_gate + i, above * Type::load(up + i, count) * slope, count);
      Type::store(grad_up + i, above * g * sigmoid, count);
    });
  });
}

}  // namespace

void swiglu_cpu(const SwigluParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case SwigluDtype::float32: return run<Float32>(p, parallel);
    case SwigluDtype::bfloat16: return run<BFloat16>(p, parallel);
    case SwigluDtype::float16: return run<Float16>(p, parallel);
  }
}

void swiglu_backward_cpu(const SwigluBackwardParams& b, const Parallel& parallel) {
  switch (b.forward.dtype) {
    case SwigluDtype::float32: return run_backward<Float32>(b, parallel);
    case SwigluDtype::bfloat16: return run_backward<BFloat16>(b, parallel);
    case SwigluDtype::float16: return run_backward<Float16>(b, parallel);
  }
}

}  // namespace ALITOK_ISA
}  // namespace alitok
