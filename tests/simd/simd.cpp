// Checks csrc/simd.h against the C library and, for 16-bit floats, against its own scalar conversions, on every bit
// pattern or on random ones. Compiled once per instruction set by test_simd.py. Prints each failure; exits with 1.
#include "simd.h"

#include <cstdio>
#include <random>

namespace alitok {
namespace ALITOK_ISA {

int failures = 0;

void expect(bool condition, const char* what, double input) {
  if (!condition && ++failures <= 20) std::printf("%s at %.9g\n", what, input);
}

bool same(float a, float b) { return a == b ? std::signbit(a) == std::signbit(b) : a != a && b != b; }

void scalar_conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float f16 = from_f16(half), bf16 = from_bf16(half);
    expect(f16 != f16 || to_f16(f16) == half, "to_f16 of from_f16", bits);
    expect(bf16 != bf16 || to_bf16(bf16) == half, "to_bf16 of from_bf16", bits);
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent < 31) {
      const float value = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24);
      expect(same(f16, half & 0x8000 ? -value : value), "from_f16", bits);
    }
  }
}

void loads_and_stores() {
  std::mt19937 random(0);
  float in[Vec::lanes], out[Vec::lanes];
  uint16_t halves[Vec::lanes];
  for (int round = 0; round < 100000; ++round) {
    const int count = static_cast<int>(random() % (Vec::lanes + 1));
    for (float& x : in) x = bits_as<float>(static_cast<uint32_t>(random()));
    const Vec v = Vec::load(in);
    for (int i = 0; i < Vec::lanes; ++i) out[i] = 7;
    v.store(out, count);
    for (int i = 0; i < Vec::lanes; ++i) expect(same(out[i], i < count ? in[i] : 7), "store of a part", i);
    Vec::load(in, count).store(out);
    for (int i = 0; i < Vec::lanes; ++i) expect(same(out[i], i < count ? in[i] : 0), "load of a part", i);

    for (uint16_t& h : halves) h = 7;
    v.store_f16(halves, count);
    for (int i = 0; i < Vec::lanes; ++i) {
      expect(i < count ? same(from_f16(halves[i]), from_f16(to_f16(in[i]))) : halves[i] == 7, "store_f16", in[i]);
    }
    Vec::load_f16(halves, count).store(out);
    for (int i = 0; i < Vec::lanes; ++i) expect(same(out[i], i < count ? from_f16(halves[i]) : 0), "load_f16", i);

    for (uint16_t& h : halves) h = 7;
    v.store_bf16(halves, count);
    for (int i = 0; i < Vec::lanes; ++i) {
      const bool flushed = std::fabs(in[i]) < 0x1p-126f;  // as simd.h says
      const bool right = same(from_bf16(halves[i]), from_bf16(to_bf16(in[i])));
      expect(i < count ? right || flushed : halves[i] == 7, "store_bf16", in[i]);
    }
    Vec::load_bf16(halves, count).store(out);
    for (int i = 0; i < Vec::lanes; ++i) expect(same(out[i], i < count ? from_bf16(halves[i]) : 0), "load_bf16", i);
  }
}

void arithmetic() {
  float x[Vec::lanes];
  for (int i = 0; i < Vec::lanes; ++i) x[i] = static_cast<float>(i + 1);
  const Vec v = Vec::load(x);
  const int n = Vec::lanes;
  expect(sum(v) == n * (n + 1) / 2 && min(v) == 1 && max(v) == n, "reductions", n);
  expect(sum(select(v <= Vec(1.0f), v, Vec(0.0f))) == 1, "select", 1);
  expect(any(v == Vec(1.0f)) && !any(v < Vec(1.0f)), "comparisons", 1);
  expect(sum(fma(v, Vec(2.0f), Vec(1.0f)) - v * Vec(2.0f)) == n, "fma", n);
  expect(sum(fnma(v, Vec(2.0f), v + v)) == 0, "fnma", n);
  expect(sum(abs(Vec(-2.0f))) == 2 * n && sum(sqrt(Vec(4.0f))) == 2 * n, "abs, sqrt", n);
  expect(max(round(Vec(2.5f))) == 2 && max(round(Vec(3.5f))) == 4, "round to even", 2.5);
}

void shuffles() {
  Vec rows[Vec::lanes];
  float x[Vec::lanes], turn[Vec::lanes], out[Vec::lanes];
  for (int i = 0; i < Vec::lanes; ++i) {
    for (int j = 0; j < Vec::lanes; ++j) x[j] = static_cast<float>(i * Vec::lanes + j);
    rows[i] = Vec::load(x);
  }
  transpose(rows);
  for (int i = 0; i < Vec::lanes; ++i) {
    rows[i].store(out);
    for (int j = 0; j < Vec::lanes; ++j) expect(out[j] == static_cast<float>(j * Vec::lanes + i), "transpose", i);
  }
  for (int count = 0; count <= Vec::lanes; ++count) {
    first_lanes(Vec(1.0f), Vec(2.0f), count).store(out);
    for (int i = 0; i < Vec::lanes; ++i) expect(out[i] == (i < count ? 1.0f : 2.0f), "first_lanes", count);
  }
#if defined(__AVX2__)
  for (int i = 0; i < Vec::lanes; ++i) x[i] = static_cast<float>(i + 1), turn[i] = i % 2 ? 0.8f : 0.6f;
  const Vec turned = rotate_pairs(Vec::load(x), Vec::load(turn));
  turned.store(out);
  for (int i = 0; i < Vec::lanes; i += 2) {
    expect(std::fabs(out[i] - (x[i] * 0.6f - x[i + 1] * 0.8f)) < 1e-5f, "rotate_pairs", i);
    expect(std::fabs(out[i + 1] - (x[i] * 0.8f + x[i + 1] * 0.6f)) < 1e-5f, "rotate_pairs", i + 1);
  }
  rotate_pairs_back(turned, Vec::load(turn)).store(out);
  for (int i = 0; i < Vec::lanes; ++i) expect(std::fabs(out[i] - x[i]) < 1e-5f, "rotate_pairs_back", i);
#endif
}

void exponential() {
  double worst = 0;
  for (float x = -87.32f; x < 88.7f; x += 1e-3f) {
    const double exact = std::exp(static_cast<double>(x));
    const auto nearest = static_cast<float>(exact);
    const double ulp = static_cast<double>(std::nextafter(nearest, INFINITY)) - nearest;
    worst = std::fmax(worst, std::fabs(max(exp(Vec(x))) - exact) / ulp);
  }
  expect(worst < 2, "exp, units in the last place", worst);
  expect(max(exp(Vec(-INFINITY))) == 0 && max(exp(Vec(-87.34f))) == 0 && max(exp(Vec(0.0f))) == 1, "exp", 0);
  expect(std::isinf(max(exp(Vec(INFINITY)))) && std::isinf(max(exp(Vec(88.73f)))), "exp", 89);
  float nan[Vec::lanes];
  exp(Vec(NAN)).store(nan);
  for (const float value : nan) expect(value != value, "exp", NAN);
}

}  // namespace ALITOK_ISA
}  // namespace alitok

int main() {
  using namespace alitok::ALITOK_ISA;
  scalar_conversions();
  loads_and_stores();
  arithmetic();
  shuffles();
  exponential();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
