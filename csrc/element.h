// The element types of tensors on the CPU, each with vector loads and stores to float32; <op>_cpu.cpp only.
#pragma once

#include <cstdint>

#include "e4m3.h"
#include "simd.h"

namespace alitok {
namespace ALITOK_ISA {

struct Float32 {
  using Storage = float;
  static float get(const float* p) { return *p; }
  static void set(float* p, float x) { *p = x; }
  static Vec load(const float* p, int count) { return Vec::load(p, count); }
  static void store(float* p, Vec x, int count) { x.store(p, count); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float get(const uint16_t* p) { return from_bf16(*p); }
  static void set(uint16_t* p, float x) { *p = to_bf16(x); }
  static Vec load(const uint16_t* p, int count) { return Vec::load_bf16(p, count); }
  static void store(uint16_t* p, Vec x, int count) { x.store_bf16(p, count); }
};

struct Float16 {
  using Storage = uint16_t;
  static float get(const uint16_t* p) { return from_f16(*p); }
  static void set(uint16_t* p, float x) { *p = to_f16(x); }
  static Vec load(const uint16_t* p, int count) { return Vec::load_f16(p, count); }
  static void store(uint16_t* p, Vec x, int count) { x.store_f16(p, count); }
};

struct E4m3 {
  using Storage = e4m3;
  static float get(const e4m3* p) { return from_e4m3(*p); }
  static void set(e4m3* p, float x) { *p = to_e4m3(x); }
  static Vec load(const e4m3* p, int count) {
    float lanes[Vec::lanes];
    for (int i = 0; i < count; ++i) lanes[i] = from_e4m3(p[i]);
    return Vec::load(lanes, count);
  }
};

// x as it is after a trip through the type.
template <class Type>
float rounded(float x) {
  typename Type::Storage stored;
  Type::set(&stored, x);
  return Type::get(&stored);
}

// f(offset, count) over [0, size) in vectors; `count` is below Vec::lanes in the last one only.
template <class F>
void for_vectors(int64_t size, const F& f) {
  for (int64_t i = 0; i < size; i += Vec::lanes) f(i, static_cast<int>(size - i < Vec::lanes ? size - i : Vec::lanes));
}

}  // namespace ALITOK_ISA
}  // namespace alitok
