#include "add_rms_norm.h"

#include <cmath>
#include <vector>

#include "element.h"
#include "scratch.h"

namespace alitok {
namespace ALITOK_ISA {
namespace {

// What dropout multiplies a row of delta with; null without dropout.
class Factors {
 public:
  explicit Factors(const AddRmsNormParams& p) : p_(p) {
    const int64_t blocks = (p.width + kDropoutColumns - 1) / kDropoutColumns;
    if (p.dropout.threshold > 0) factors_.resize(static_cast<size_t>(blocks * kDropoutColumns));
  }
  const float* of_row(int64_t row) {
    if (p_.dropout.threshold == 0) return nullptr;
    const auto seed = static_cast<uint64_t>(*p_.dropout.seed);
    dropout_factors(seed, p_.dropout.threshold, p_.dropout.scale, 0, static_cast<uint32_t>(row), p_.width,
                    factors_.data());
    return factors_.data();
  }

 private:
  const AddRmsNormParams& p_;
  std::vector<float> factors_;
};

Vec scaled(Vec x, const float* factors, int64_t i, int count) {
  return factors == nullptr ? x : x * Vec::load(factors + i, count);
}

template <class Type>
Vec round_to(Vec x) {
  typename Type::Storage stored[Vec::lanes];
  Type::store(stored, x, Vec::lanes);
  return Type::load(stored, Vec::lanes);
}
template <>
Vec round_to<Float32>(Vec x) {
  return x;
}

Vec inverse_rms(const AddRmsNormParams& p, Vec squares) {
  return 1 / std::sqrt(sum(squares) / static_cast<float>(p.width) + p.eps);
}

template <class Type, class Weight>
void normalise(const AddRmsNormParams& p, int64_t row, const float* factors) {
  using T = typename Type::Storage;
  const float* x = p.x + row * p.width;
  Vec squares;
  if (p.delta != nullptr) {
    const T* delta = static_cast<const T*>(p.delta) + row * p.width;
    float* sum = p.sum + row * p.width;
    for_vectors(p.width, [&](int64_t i, int count) {
      const Vec v = Vec::load(x + i, count) + scaled(Type::load(delta + i, count), factors, i, count);
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
  const Vec inverse = inverse_rms(p, squares);
  const auto* weight = static_cast<const typename Weight::Storage*>(p.weight);
  T* normed = static_cast<T*>(p.normed) + row * p.width;
  for_vectors(p.width, [&](int64_t i, int count) {
    const Vec n = round_to<Weight>(Vec::load(x + i, count) * inverse);  // before the weight, as the reference
    Type::store(normed + i, n * Weight::load(weight + i, count), count);
  });
}

template <class Type, class Weight>
void forward(const AddRmsNormParams& p, const Parallel& parallel) {
  Scratch<Factors> scratch(parallel, p.rows, p);
  parallel(0, p.rows, 1 + 16384 / p.width, [&](int64_t begin, int64_t end) {
    Factors& factors = scratch.take();
    for (int64_t row = begin; row < end; ++row) normalise<Type, Weight>(p, row, factors.of_row(row));
  });
}

// With n = sum / rms, g = grad_normed w: grad of the sum = grad_sum + (g - n mean(g n)) / rms, grad_w = sum of
// grad_normed n over rows. Roundings count as identity.
template <class Type, class Weight>
void backward_row(const AddRmsNormBackwardParams& b, int64_t row, const float* factors, float* grad_weight) {
  using T = typename Type::Storage;
  const AddRmsNormParams& p = b.forward;
  const int64_t at = row * p.width;
  const float* x = p.x + at;
  const auto* weight = static_cast<const typename Weight::Storage*>(p.weight);
  const T* grad_normed = static_cast<const T*>(b.grad_normed) + at;
  Vec squares, along;
  for_vectors(p.width, [&](int64_t i, int count) {
    const Vec v = Vec::load(x + i, count);
    squares = fma(v, v, squares);
    along = fma(Type::load(grad_normed + i, count) * Weight::load(weight + i, count), v, along);
  });
  const Vec inverse = inverse_rms(p, squares), mean = Vec(sum(along) / static_cast<float>(p.width)) * inverse;
  for_vectors(p.width, [&](int64_t i, int count) {
    const Vec n = Vec::load(x + i, count) * inverse, above = Type::load(grad_normed + i, count);
    fma(above, round_to<Weight>(n), Vec::load(grad_weight + i, count)).store(grad_weight + i, count);
    Vec grad = inverse * fnma(n, mean, above * Weight::load(weight + i, count));
    if (b.grad_sum != nullptr) grad += Vec::load(b.grad_sum + at + i, count);
    grad.store(b.grad_x + at + i, count);
    if (b.grad_delta != nullptr) {
      Type::store(static_cast<T*>(b.grad_delta) + at + i, scaled(grad, factors, i, count), count);
    }
  });
}

template <class Type, class Weight>
void backward(const AddRmsNormBackwardParams& b, const Parallel& parallel) {
  const AddRmsNormParams& p = b.forward;
  const int64_t parts = add_rms_norm_parts_cpu(p.rows);
  float* partials = static_cast<float*>(b.workspace);
  Scratch<Factors> scratch(parallel, parts, p);
  parallel(0, parts, 1, [&](int64_t begin, int64_t end) {
    Factors& factors = scratch.take();
    for (int64_t part = begin; part < end; ++part) {
      float* partial = partials + part * p.width;
      for (int64_t i = 0; i < p.width; ++i) partial[i] = 0;
      for (int64_t row = part * p.rows / parts; row < (part + 1) * p.rows / parts; ++row) {
        backward_row<Type, Weight>(b, row, b.grad_delta == nullptr ? nullptr : factors.of_row(row), partial);
      }
    }
  });
  for_vectors(p.width, [&](int64_t i, int count) {
    Vec total;
    for (int64_t part = 0; part < parts; ++part) total += Vec::load(partials + part * p.width + i, count);
    total.store(b.grad_weight + i, count);
  });
}

// f.run<Type, Weight>() for the dtypes of p.
template <class F>
void with_types(const AddRmsNormParams& p, const F& f) {
  const bool exact = p.weight_dtype == AddRmsNormDtype::float32;
  switch (p.dtype) {
    case AddRmsNormDtype::float32: return f.template run<Float32, Float32>();
    case AddRmsNormDtype::bfloat16:
      return exact ? f.template run<BFloat16, Float32>() : f.template run<BFloat16, BFloat16>();
    case AddRmsNormDtype::float16:
      return exact ? f.template run<Float16, Float32>() : f.template run<Float16, Float16>();
  }
}

struct Forward {
  const AddRmsNormParams& p;
  const Parallel& parallel;
  template <class Type, class Weight>
  void run() const {
    forward<Type, Weight>(p, parallel);
  }
};

struct Backward {
  const AddRmsNormBackwardParams& b;
  const Parallel& parallel;
  template <class Type, class Weight>
  void run() const {
    backward<Type, Weight>(b, parallel);
  }
};

}  // namespace

void add_rms_norm_cpu(const AddRmsNormParams& p, const Parallel& parallel) { with_types(p, Forward{p, parallel}); }

void add_rms_norm_backward_cpu(const AddRmsNormBackwardParams& b, const Parallel& parallel) {
  with_types(b.forward, Backward{b, parallel});
}

}  // namespace ALITOK_ISA
}  // namespace alitok
