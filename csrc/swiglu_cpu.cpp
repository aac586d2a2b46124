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

}  // namespace

void swiglu_cpu(const SwigluParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case SwigluDtype::float32: return run<Float32>(p, parallel);
    case SwigluDtype::bfloat16: return run<BFloat16>(p, parallel);
    case SwigluDtype::float16: return run<Float16>(p, parallel);
  }
}

}  // namespace ALITOK_ISA
}  // namespace alitok
