// Argument checks for the glue. Each message names the argument, what was expected and what came:
// "z: expected float32, got float64". They throw std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dropout.h"

namespace alitok {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Expected, class Actual>
[[noreturn]] void fail(const char* argument, const Expected& expected, const Actual& actual) {
  std::ostringstream message;
  message << std::boolalpha << argument << ": expected " << expected << ", got " << actual;
  throw std::invalid_argument(message.str());
}

template <class Expected, class Actual>
void check(bool condition, const char* argument, const Expected& expected, const Actual& actual) {
  if (!condition) fail(argument, expected, actual);
}

// The name that Python users know: float32, not Float.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_name(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) {
    text += std::to_string(t.size(i)) + (i + 1 < t.dim() ? ", " : t.dim() == 1 ? "," : "");
  }
  return text + ")";
}

inline std::string device_name(const Tensor& t) {
  const auto device = t.device();
  const auto index = std::to_string(device.index());
  if (device.is_cpu()) return "cpu";
  return device.is_cuda() ? "cuda:" + index
                          : "device type " + std::to_string(static_cast<int>(device.type())) + ":" + index;
}

inline void check_dtype(const Tensor& t, const char* argument, std::initializer_list<ScalarType> allowed) {
  std::string expected;
  for (const ScalarType dtype : allowed) {
    if (t.scalar_type() == dtype) return;
    expected += (expected.empty() ? "" : " or ") + dtype_name(dtype);
  }
  fail(argument, expected, dtype_name(t.scalar_type()));
}

inline void check_dim(const Tensor& t, const char* argument, int64_t dim) {
  check(t.dim() == dim, argument, std::to_string(dim) + " dimensions", "shape " + shape_name(t));
}

// check_size(codebook, "codebook", 1, z.size(1)): call check_dim first.
inline void check_size(const Tensor& t, const char* argument, int64_t axis, int64_t size) {
  check(t.size(axis) == size, argument, "size " + std::to_string(size) + " along dimension " + std::to_string(axis),
        "shape " + shape_name(t));
}

inline void check_shape(const Tensor& t, const char* argument, std::initializer_list<int64_t> shape) {
  check_dim(t, argument, static_cast<int64_t>(shape.size()));
  int64_t axis = 0;
  for (const int64_t size : shape) check_size(t, argument, axis++, size);
}

inline void check_contiguous(const Tensor& t, const char* argument) {
  check(t.is_contiguous(), argument, "a contiguous tensor", "strides that are not");
}

inline void check_same_device(const Tensor& t, const char* argument, const Tensor& other, const char* other_name) {
  check(t.device() == other.device(), argument, "the device of " + std::string(other_name) + ", " + device_name(other),
        device_name(t));
}

inline void check_range(int64_t value, const char* argument, int64_t lowest, int64_t highest) {
  check(lowest <= value && value <= highest, argument,
        "a value in " + std::to_string(lowest) + ".." + std::to_string(highest), value);
}

// An argument by its name; no tensor where it is None.
struct Argument {
  Argument(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
  Argument(const char* name, const std::optional<Tensor>& tensor)
      : name(name), tensor(tensor.has_value() ? &*tensor : nullptr) {}
  const char* name;
  const Tensor* tensor;
};

// Before anything else in every operator, with all its tensors: they lie on the device of the first, and their sizes
// can be multiplied with each other's and with small factors. An empty or an expanded tensor may have any sizes.
inline void check_tensors(std::initializer_list<Argument> arguments) {
  const Argument& first = *arguments.begin();
  for (const Argument& argument : arguments) {
    if (argument.tensor == nullptr) continue;
    check(argument.tensor->defined(), argument.name, "a tensor", "None");  // which torch lets through
    check_same_device(*argument.tensor, argument.name, *first.tensor, first.name);
    int64_t product = 1;
    bool fits = true;
    for (int64_t axis = 0; axis < argument.tensor->dim(); ++axis) {
      const int64_t size = argument.tensor->size(axis);
      fits = fits && !__builtin_mul_overflow(product, size > 0 ? size : 1, &product);
    }
    check(fits && product < int64_t{1} << 48, argument.name, "sizes whose product, those of 0 left out, is below 2^48",
          "shape " + shape_name(*argument.tensor));
  }
}

// A probability of dropout, rounded to a multiple of 2^-16 (half to even, as Python), and its seed, which is needed
// where that is not 0.
inline Dropout check_dropout(double dropout, const std::optional<Tensor>& seed) {
  constexpr double kSteps = 65536;
  check(dropout >= 0 && dropout < 1, "dropout", "a probability in [0, 1)", dropout);
  const auto threshold = static_cast<uint32_t>(std::nearbyint(dropout * kSteps));
  check(threshold < kSteps, "dropout", "at most 1 - 2**-16", dropout);
  if (threshold == 0) return {0, 1.0f, nullptr};
  check(seed.has_value(), "seed", "a tensor where dropout > 0", "None");
  check_dtype(*seed, "seed", {ScalarType::Long});
  check(seed->numel() == 1, "seed", "one element", "shape " + shape_name(*seed));
  return {threshold, static_cast<float>(1 / (1 - threshold / kSteps)), static_cast<const int64_t*>(seed->data_ptr())};
}

}  // namespace alitok
