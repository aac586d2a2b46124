// Working memory of a CPU kernel: floats aligned to a cache line, uninitialised until zero(), which belongs into the
// thread that uses them.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

namespace alitok::ALITOK_ISA {

class FloatBuffer {
 public:
  explicit FloatBuffer(int64_t size)
      : size_(size), data_(static_cast<float*>(::operator new(size * sizeof(float), kAlignment))) {}
  ~FloatBuffer() { ::operator delete(data_, kAlignment); }
  FloatBuffer(FloatBuffer&& other) noexcept : size_(other.size_), data_(std::exchange(other.data_, nullptr)) {}
  FloatBuffer& operator=(FloatBuffer&&) = delete;

  void zero() { std::memset(data_, 0, size_ * sizeof(float)); }
  operator float*() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  int64_t size_;
  float* data_;
};

}  // namespace alitok::ALITOK_ISA
