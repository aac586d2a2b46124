// A vector of floats as wide as the instruction set that the file is compiled for: 16, 8 or 1 lanes. One kernel source
// serves all three; <op>_cpu.cpp only. bfloat16 and float16 travel as uint16_t.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace alitok {
namespace ALITOK_ISA {

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float from_bf16(uint16_t x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }

// Round to nearest even; a NaN stays one.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00) return bits_as<float>(sign | 0x7f800000u | magnitude << 13);  // infinity, NaN
  // 2^112 moves the exponent from bias 15 to 127 and makes subnormals normal.
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f));
}

inline uint16_t to_f16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: the addition rounds at 2^-24
    const uint32_t rounded = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
    return static_cast<uint16_t>(sign | rounded);
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// For each set: construction (Vec{} is zero), loads and stores of all or of the first `count` lanes (the rest read as
// zero and are not touched), arithmetic, comparisons to a Mask, select(mask, where_true, where_false), reductions.
// min and max return the second argument when either is NaN, as the instructions do.

#if defined(__AVX512F__)

struct Mask {
  __mmask16 m;
};

struct Vec {
  static constexpr int lanes = 16;
  __m512 v;

  Vec() : v(_mm512_setzero_ps()) {}
  Vec(__m512 x) : v(x) {}
  Vec(float x) : v(_mm512_set1_ps(x)) {}

  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }

  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int count) const { _mm512_mask_storeu_ps(p, first(count), v); }

  static Vec widen_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static Vec load_bf16(const uint16_t* p) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vec load_bf16(const uint16_t* p, int count) { return widen_bf16(_mm256_maskz_loadu_epi16(first(count), p)); }
  // The instruction rounds to nearest even and flushes subnormal results (below 2^-126) to zero.
  __m256i narrow_bf16() const { return bits_as<__m256i>(_mm512_cvtneps_pbh(v)); }
  void store_bf16(uint16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16()); }
  void store_bf16(uint16_t* p, int count) const { _mm256_mask_storeu_epi16(p, first(count), narrow_bf16()); }

  static Vec load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vec load_f16(const uint16_t* p, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
  }
  __m256i narrow_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  void store_f16(uint16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16()); }
  void store_f16(uint16_t* p, int count) const { _mm256_mask_storeu_epi16(p, first(count), narrow_f16()); }
};

inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask operator<=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline bool any(Mask mask) { return mask.m != 0; }
inline Vec select(Mask mask, Vec a, Vec b) { return _mm512_mask_blend_ps(mask.m, b.v, a.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }    // a b + c
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }  // c - a b
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
inline Vec reciprocal(Vec a) {  // to an ulp, of numbers whose reciprocal is normal
  const Vec x = _mm512_rcp14_ps(a.v);
  return fma(x, fnma(a, x, Vec(1.0f)), x);
}
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_by_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }  // a 2^n, integer n
// The first `count` lanes of a, the others of b.
inline Vec first_lanes(Vec a, Vec b, int count) { return _mm512_mask_blend_ps(Vec::first(count), b.v, a.v); }
// Pairs of lanes (x0, x1) turned by those of turn = (c, s): (x0 c - x1 s, x0 s + x1 c), and back again.
inline Vec rotate_pairs(Vec x, Vec turn) {
  const __m512 across = _mm512_mul_ps(_mm512_permute_ps(x.v, 0xB1), _mm512_movehdup_ps(turn.v));
  return _mm512_fmaddsub_ps(x.v, _mm512_moveldup_ps(turn.v), across);
}
inline Vec rotate_pairs_back(Vec x, Vec turn) {
  const __m512 across = _mm512_mul_ps(_mm512_permute_ps(x.v, 0xB1), _mm512_movehdup_ps(turn.v));
  return _mm512_fmsubadd_ps(x.v, _mm512_moveldup_ps(turn.v), across);
}
// The lanes of a and b in turn: a0 b0 a1 b1 ...
inline void interleave(Vec a, Vec b, Vec* first, Vec* second) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *first = _mm512_permutex2var_ps(a.v, low, b.v);
  *second = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b.v);
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float min(Vec a) { return _mm512_reduce_min_ps(a.v); }
inline float max(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__)

struct Mask {
  __m256 m;
};

struct Vec {
  static constexpr int lanes = 8;
  __m256 v;

  Vec() : v(_mm256_setzero_ps()) {}
  Vec(__m256 x) : v(x) {}
  Vec(float x) : v(_mm256_set1_ps(x)) {}

  static __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  // AVX2 has no masked access to 16-bit lanes.
  static __m128i first_halves(const uint16_t* p, int count) {
    uint16_t lanes16[lanes] = {};
    std::memcpy(lanes16, p, sizeof(uint16_t) * static_cast<size_t>(count));
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes16));
  }
  static void store_halves(uint16_t* p, __m128i x, int count) {
    uint16_t lanes16[lanes];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes16), x);
    std::memcpy(p, lanes16, sizeof(uint16_t) * static_cast<size_t>(count));
  }

  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int count) const { _mm256_maskstore_ps(p, first(count), v); }

  static Vec widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static Vec load_bf16(const uint16_t* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load_bf16(const uint16_t* p, int count) { return widen_bf16(first_halves(p, count)); }
  __m128i narrow_bf16() const {  // as to_bf16
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  void store_bf16(uint16_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16()); }
  void store_bf16(uint16_t* p, int count) const { store_halves(p, narrow_bf16(), count); }

  static Vec load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Vec load_f16(const uint16_t* p, int count) { return _mm256_cvtph_ps(first_halves(p, count)); }
  __m128i narrow_f16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  void store_f16(uint16_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16()); }
  void store_f16(uint16_t* p, int count) const { store_halves(p, narrow_f16(), count); }
};

inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask operator<=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline bool any(Mask mask) { return _mm256_movemask_ps(mask.m) != 0; }
inline Vec select(Mask mask, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, mask.m); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
inline Vec reciprocal(Vec a) { return Vec(1.0f) / a; }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(__m256i n) {  // n in -126..127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline Vec scale_by_power_of_two(Vec a, Vec n) {  // in two steps, so that subnormal and infinite results come out
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  return a * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
}
inline Vec first_lanes(Vec a, Vec b, int count) {
  return _mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(Vec::first(count)));
}
inline Vec rotate_pairs(Vec x, Vec turn) {
  const __m256 across = _mm256_mul_ps(_mm256_permute_ps(x.v, 0xB1), _mm256_movehdup_ps(turn.v));
  return _mm256_fmaddsub_ps(x.v, _mm256_moveldup_ps(turn.v), across);
}
inline Vec rotate_pairs_back(Vec x, Vec turn) {
  const __m256 across = _mm256_mul_ps(_mm256_permute_ps(x.v, 0xB1), _mm256_movehdup_ps(turn.v));
  return _mm256_fmsubadd_ps(x.v, _mm256_moveldup_ps(turn.v), across);
}
inline void interleave(Vec a, Vec b, Vec* first, Vec* second) {
  const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
  *first = _mm256_permute2f128_ps(low, high, 0x20);
  *second = _mm256_permute2f128_ps(low, high, 0x31);
}
inline float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float min(Vec a) {
  __m128 x = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_min_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
}
inline float max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

#else

struct Mask {
  bool m;
};

struct Vec {
  static constexpr int lanes = 1;
  float v;

  Vec() : v(0) {}
  Vec(float x) : v(x) {}

  static Vec load(const float* p) { return *p; }
  static Vec load(const float* p, int count) { return count > 0 ? *p : 0.0f; }
  void store(float* p) const { *p = v; }
  void store(float* p, int count) const {
    if (count > 0) *p = v;
  }
  static Vec load_bf16(const uint16_t* p) { return from_bf16(*p); }
  static Vec load_bf16(const uint16_t* p, int count) { return count > 0 ? from_bf16(*p) : 0.0f; }
  void store_bf16(uint16_t* p) const { *p = to_bf16(v); }
  void store_bf16(uint16_t* p, int count) const {
    if (count > 0) *p = to_bf16(v);
  }
  static Vec load_f16(const uint16_t* p) { return from_f16(*p); }
  static Vec load_f16(const uint16_t* p, int count) { return count > 0 ? from_f16(*p) : 0.0f; }
  void store_f16(uint16_t* p) const { *p = to_f16(v); }
  void store_f16(uint16_t* p, int count) const {
    if (count > 0) *p = to_f16(v);
  }
};

inline Vec operator+(Vec a, Vec b) { return a.v + b.v; }
inline Vec operator-(Vec a, Vec b) { return a.v - b.v; }
inline Vec operator*(Vec a, Vec b) { return a.v * b.v; }
inline Vec operator/(Vec a, Vec b) { return a.v / b.v; }
inline Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
inline Mask operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
inline Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
inline bool any(Mask mask) { return mask.m; }
inline Vec select(Mask mask, Vec a, Vec b) { return mask.m ? a : b; }
// Not std::fma: without the instruction that is a slow function call.
inline Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
inline Vec fnma(Vec a, Vec b, Vec c) { return c.v - a.v * b.v; }
inline Vec min(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }
inline Vec max(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
inline Vec sqrt(Vec a) { return std::sqrt(a.v); }
inline Vec reciprocal(Vec a) { return 1.0f / a.v; }
inline Vec abs(Vec a) { return std::fabs(a.v); }
inline Vec round(Vec a) { return std::nearbyint(a.v); }
inline Vec scale_by_power_of_two(Vec a, Vec n) {  // as for AVX2
  const auto power_of_two = [](int n) { return bits_as<float>(static_cast<uint32_t>(n + 127) << 23); };
  const int whole = static_cast<int>(n.v), half = whole >> 1;
  return a.v * power_of_two(half) * power_of_two(whole - half);
}
inline Vec first_lanes(Vec a, Vec b, int count) { return count > 0 ? a : b; }
inline float sum(Vec a) { return a.v; }
inline float min(Vec a) { return a.v; }
inline float max(Vec a) { return a.v; }

#endif

inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec& operator*=(Vec& a, Vec b) { return a = a * b; }

// A block of lanes x lanes: each round moves every element's (row, lane) by one bit, the last has exchanged the two.
inline void transpose(Vec (&rows)[Vec::lanes]) {
#if defined(__AVX2__)
  for (int round = 1; round < Vec::lanes; round *= 2) {
    Vec mixed[Vec::lanes];
    for (int i = 0; i < Vec::lanes / 2; ++i)
      interleave(rows[i], rows[i + Vec::lanes / 2], &mixed[2 * i], &mixed[2 * i + 1]);
    for (int i = 0; i < Vec::lanes; ++i) rows[i] = mixed[i];
  }
#else
  (void)rows;
#endif
}

// e^x to 2 units in the last place; 0 below -87.33 (no subnormal results: each would cost a microcode assist),
// infinity above 88.72, NaN at NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series to r^7.
inline Vec exp(Vec x) {
  const Vec lowest(-87.33f);
  const Vec bounded = min(Vec(128.0f), max(lowest, x));  // NaN passes: it is the second argument
  const Vec n = round(bounded * Vec(1.44269504089f));
  const Vec r = fnma(n, Vec(-2.12194440e-4f), fnma(n, Vec(0.693359375f), bounded));
  Vec p = Vec(1.0f / 5040);
  p = fma(p, r, Vec(1.0f / 720));
  p = fma(p, r, Vec(1.0f / 120));
  p = fma(p, r, Vec(1.0f / 24));
  p = fma(p, r, Vec(1.0f / 6));
  p = fma(p, r, Vec(0.5f));
  p = fma(p, r, Vec(1.0f));
  p = fma(p, r, Vec(1.0f));
  return select(x < lowest, Vec(), scale_by_power_of_two(p, n));
}

// 2^x for x <= 0, to 2 units in the last place, and 2^-126 below (so that nothing is subnormal); NaN at NaN.
// x = n + r with |r| <= 1/2; 2^r by a minimax polynomial.
inline Vec exp2_of_negative(Vec x) {
  const Vec bounded = max(Vec(-126.0f), x);  // NaN passes: it is the second argument
  const Vec n = round(bounded), r = bounded - n;
  Vec p = Vec(1.534580999e-04f);
  p = fma(p, r, Vec(1.339993185e-03f));
  p = fma(p, r, Vec(9.618488970e-03f));
  p = fma(p, r, Vec(5.550328775e-02f));
  p = fma(p, r, Vec(2.402264689e-01f));
  p = fma(p, r, Vec(6.931472057e-01f));
  p = fma(p, r, Vec(1.0f));
  return scale_by_power_of_two(p, n);
}

}  // namespace ALITOK_ISA
}  // namespace alitok
