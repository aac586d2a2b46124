#include "add_rms_norm.h"

#include <cmath>

#include "element.h"

namespace alitok {
namespace ALITOK_ISA {
namespace {

template <class Type>
void normalise(const AddRmsNormParams& p, int64_t row) {
  using T = typename Type::Storage;
  const float* x = p.x + row * p.width;
  Vec squares;
  if (p.delta != nullptr) {
    const T* delta = static_cast<const T*>(p.delta) + row * p.width;
    float* sum = p.sum + row * p.width;
    for_vectors(p.width, [&](int64_t i, int count) {
      const Vec v = Vec::load(x + i, count) + Type::load(delta + i, count);
      v.store(sum + i, count);
      squares = fma(v, v, squares);
    });
    x = sum;
  } else {
    for_vectors(p.width, [&](int64_t i, int count) {
      const Vec v = Vec::load(x + i, count);
      squares = fma(v, v, squares);
    });
  }
  const Vec inverse(1 / std::sqrt(sum(squares) / static_cast<float>(p.width) + p.eps));
  const T* weight = static_cast<const T*>(p.weight);
  T* normed = static_cast<T*>(p.normed) + row * p.width;
  for_vectors(p.width, [&](int64_t i, int count) {
    Type::store(normed + i, Vec::load(x + i, count) * inverse, count);  // rounds before the weight, as the reference
    Type::store(normed + i, Type::load(normed + i, count) * Type::load(weight + i, count), count);
  });
}

template <class Type>
void run(const AddRmsNormParams& p, const Parallel& parallel) {
  parallel(0, p.rows, 1 + 16384 / p.width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) normalise<Type>(p, row);
  });
}

}  // namespace

void add_rms_norm_cpu(const AddRmsNormParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case AddRmsNormDtype::float32: return run<Float32>(p, parallel);
    case AddRmsNormDtype::bfloat16: return run<BFloat16>(p, parallel);
    case AddRmsNormDtype::float16: return run<Float16>(p, parallel);
  }
}

}  // namespace ALITOK_ISA
}  // namespace alitok
