// The 8-bit float e4m3 (finite values and NaN, no infinity; largest 448) of quantised caches, for CPU and CUDA kernels.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace alitok {

struct e4m3 {
  uint8_t bits;
};

// Nearest, ties to even; beyond 448 saturates; NaN stays NaN.
ALITOK_HOST_DEVICE e4m3 to_e4m3(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = u >> 24 & 0x80;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return {static_cast<uint8_t>(sign | 0x7f)};
  float magnitude;
  memcpy(&magnitude, &u, 4);
  if (magnitude >= 448.0f) return {static_cast<uint8_t>(sign | 0x7e)};
  if (magnitude < 0x1p-6f) {
    // Denormals are multiples of 2^-9. Adding 2^14 (one unit in the last place: 2^-9) rounds to them, ties to even.
    const float shifted = magnitude + 0x1p14f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    return {static_cast<uint8_t>(sign | (bits & 0xf))};
  }
  u += 0x7ffff + (u >> 20 & 1);  // round the mantissa to 3 bits; a carry moves on into the exponent, as it should
  return {static_cast<uint8_t>(sign | ((u >> 20) - (120 << 3)))};
}

ALITOK_HOST_DEVICE float from_e4m3(e4m3 x) {
  const uint32_t magnitude = x.bits & 0x7f;
  // As the exponent and mantissa of a float32 the bits stand for value * 2^-120; denormals come out right as well,
  // wherever float32 denormals are kept. To be independent of that, those 8 values are made from their integer.
  uint32_t u = magnitude == 0x7f ? 0x7fc00000u : (magnitude << 20) + (120u << 23);
  float value;
  memcpy(&value, &u, 4);
  if (magnitude < 8) value = static_cast<float>(magnitude) * 0x1p-9f;
  return x.bits & 0x80 ? -value : value;
}

}  // namespace alitok
