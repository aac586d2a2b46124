// Rows into and out of the products of linear layers: LayerNorm before, bias, GELU and residual after. <op>_cpu.cpp only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "element.h"
#include "float_buffer.h"
#include "packed_linear.h"
#include "scratch.h"

namespace alitok {
namespace ALITOK_ISA {

// erf to 4e-7, as x P(x^2) / Q(x^2): the minimax fit of that form on |x| <= 3.92, beyond which float32 has 1.
inline Vec erf(Vec x) {
  const Vec bounded = min(max(x, Vec(-3.92f)), Vec(3.92f)), t = bounded * bounded;
  Vec p = Vec(2.050039038e-06f), q = Vec(3.809130881e-05f);
  for (const float c : {2.848842162e-04f, 3.765742841e-03f, 5.274907047e-02f, 1.904095810e-01f, 1.128379146e+00f})
    p = fma(p, t, Vec(c));
  for (const float c : {1.162564369e-03f, 1.496945605e-02f, 1.141103446e-01f, 5.020788365e-01f, 1.0f})
    q = fma(q, t, Vec(c));
  return bounded * p * reciprocal(q);
}

inline Vec gelu(Vec x) {
  const Vec half = x * Vec(0.5f);
  return fma(half, erf(x * Vec(0.70710678118654752f)), half);
}

// A row of x in float32, normalised where there is a norm; `values` ends in whole vectors.
template <class Type>
void load_row(const PackedLinearParams& p, int64_t row, float* values) {
  const auto* x = static_cast<const typename Type::Storage*>(p.x) + row * p.inputs;
  if (p.norm_weight == nullptr) {
    for_vectors(p.inputs, [&](int64_t i, int count) { Type::load(x + i, count).store(values + i, count); });
    return;
  }
  Vec total, squares;
  for_vectors(p.inputs, [&](int64_t i, int count) {
    const Vec v = Type::load(x + i, count);
    v.store(values + i, count);
    total += v;
  });
  const Vec mean = sum(total) / static_cast<float>(p.inputs);
  for_vectors(p.inputs, [&](int64_t i, int count) {
    const Vec v = first_lanes(Vec::load(values + i, count) - mean, Vec(), count);
    squares = fma(v, v, squares);
  });
  const Vec inverse = 1 / std::sqrt(sum(squares) / static_cast<float>(p.inputs) + p.norm_eps);
  for_vectors(p.inputs, [&](int64_t i, int count) {
    const Vec v = (Vec::load(values + i, count) - mean) * inverse;
    fma(v, Vec::load(p.norm_weight + i, count), Vec::load(p.norm_bias + i, count)).store(values + i, count);
  });
}

// for_vectors over columns of a panel, which has 32 but for the last one: with constant counts there, and so no masks.
template <class F>
void for_panel(int64_t columns, const F& f) {
  if (columns != 32) return for_vectors(columns, f);
#pragma GCC unroll 32
  for (int64_t i = 0; i < 32; i += Vec::lanes) f(i, std::integral_constant<int, Vec::lanes>{});
}

// Whether results of so many bytes go past the caches: they would push out what is multiplied, and fetch each line
// before they overwrite it.
inline bool streams(int64_t bytes) { return bytes >= int64_t{1} << 21; }

// Columns 0 .. columns - 1 of a panel in one row of a result, `value(i, count)` those from i on. After streaming, a thread
// calls finish_streaming.
template <class Type, class F>
void write_panel(typename Type::Storage* out, int64_t columns, bool stream, const F& value) {
#if defined(__AVX512BF16__)
  constexpr std::integral_constant<int, 16> all{};
  if (stream && columns == 32 && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    const Vec low = value(0, all), high = value(16, all);
    if constexpr (sizeof(*out) == sizeof(float)) {
      _mm512_stream_ps(out, low.v);
      _mm512_stream_ps(out + 16, high.v);
    } else {
      static_assert(std::is_same_v<Type, BFloat16>);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
    }
    return;
  }
#else
  (void)stream;
#endif
  for_panel(columns, [&](int64_t i, auto n) { Type::store(out + i, value(i, n), n); });
}
inline void finish_streaming() {
#if defined(__AVX512BF16__)
  _mm_sfence();
#endif
}

// Outputs first .. first + count of a row, from their products.
template <class Type>
void store_row(const PackedLinearParams& p, int64_t row, int64_t first, int64_t count, bool stream,
               const float* products) {
  auto* out = static_cast<typename Type::Storage*>(p.out) + row * p.outputs + first;
  write_panel<Type>(out, count, stream, [&](int64_t i, auto n) {
    Vec v = Vec::load(products + i);
    if (p.bias != nullptr) v += Vec::load(p.bias + first + i, n);
    if (p.gelu) v = gelu(v);
    if (p.residual != nullptr) v += Vec::load(p.residual + row * p.outputs + first + i, n);
    return v;
  });
}

// f.run<X, Out>() for the dtypes of p.
template <class F>
void with_linear_types(const PackedLinearParams& p, const F& f) {
  const bool narrow = p.out_dtype == LinearDtype::bfloat16;
  if (p.x_dtype == LinearDtype::bfloat16) {
    return narrow ? f.template run<BFloat16, BFloat16>() : f.template run<BFloat16, Float32>();
  }
  return narrow ? f.template run<Float32, BFloat16>() : f.template run<Float32, Float32>();
}

// Blocks of rows are packed into slots, as many at a time as stay in the second-level cache; then each panel of weights
// meets all of them: `pack(first block, slots)`, which shares its work among the threads, and
// `multiply(panel, first block, slots begin, end)` after the constructor of a Setup of its thread.
template <class Setup, class Pack, class Multiply>
void for_blocks_and_panels(int64_t blocks, int64_t panels, int64_t most_slots, const Parallel& parallel,
                           const Pack& pack, const Multiply& multiply) {
  for (int64_t first = 0; first < blocks; first += most_slots) {
    const int64_t slots = std::min(most_slots, blocks - first);
    pack(first, slots);
    // With more threads than panels, each panel's blocks are shared.
    const int64_t shares = std::min<int64_t>(slots, 1 + 4 * parallel.threads / std::max<int64_t>(panels, 1));
    parallel(0, panels * shares, 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Setup setup{};
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t share = unit % shares;
        multiply(unit / shares, first, slots * share / shares, slots * (share + 1) / shares);
      }
      finish_streaming();
    });
  }
}

// Whether there are blocks enough for each thread to have its own, of nearly the same number.
inline bool own_blocks(int64_t blocks, const Parallel& parallel) { return blocks >= 8 * int64_t{parallel.threads}; }

// As for_blocks_and_panels, but each thread packs the blocks that it multiplies, into a Space of its own, so that no thread
// waits for another before the end: `pack(space, block, slot)` and `multiply(space, panel, first block, slots)`.
template <class Setup, class Space, class Pack, class Multiply>
void for_own_blocks(int64_t blocks, int64_t panels, int64_t most_slots, const Parallel& parallel,
                    Scratch<Space>& spaces, const Pack& pack, const Multiply& multiply) {
  parallel(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Space& space = spaces.take();
    [[maybe_unused]] Setup setup{};
    for (int64_t first = begin; first < end; first += most_slots) {
      const int64_t slots = std::min(most_slots, end - first);
      for (int64_t slot = 0; slot < slots; ++slot) pack(space, first + slot, slot);
      for (int64_t panel = 0; panel < panels; ++panel) multiply(space, panel, first, slots);
    }
    finish_streaming();
  });
}

// A row in float32, before it is rounded; zeros where nothing was written.
struct FloatRow {
  FloatBuffer values;
  explicit FloatRow(int64_t size) : values(size) { values.zero(); }
};

// pack(slot, row) for all slots, on all threads, each with a row of so many numbers.
template <class Pack>
void pack_slots(int64_t slots, int64_t row_size, const Parallel& parallel, const Pack& pack) {
  Scratch<FloatRow> rows(parallel, slots, row_size);
  parallel(0, slots, 1, [&](int64_t begin, int64_t end) {
    FloatRow& row = rows.take();
    for (int64_t slot = begin; slot < end; ++slot) pack(slot, +row.values);
  });
}

}  // namespace ALITOK_ISA
}  // namespace alitok
