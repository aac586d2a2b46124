// int8_linear: x W^T + bias with both factors rounded to 8 bits, for the many rows of a decoder pass. CPU only.
// The definition is int8_linear_reference in alitok_fast/ops/int8_linear.py.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "parallel.h"

namespace alitok {

enum class Int8LinearDtype : int { float32, bfloat16 };

// The weights lie in panels of kInt8PanelOutputs outputs, and a panel in groups of kInt8GroupInputs inputs. A group is
// (inputs / 4, outputs, 4) bytes w + 128 with w in -127..127, then a float32 scale for each output.
// What is missing to whole panels and groups is zero, with a scale of zero.
constexpr int64_t kInt8PanelOutputs = 32;
constexpr int64_t kInt8GroupInputs = 64;
constexpr int64_t kInt8GroupBytes = kInt8PanelOutputs * (kInt8GroupInputs + 4);

struct Int8LinearParams {
  Int8LinearDtype x_dtype, out_dtype;
  int64_t rows, inputs, outputs;
  const void* x;          // (rows, inputs)
  const uint8_t* weight;  // (panels, groups, kInt8GroupBytes), aligned to 64 bytes
  const float* bias;      // (outputs) or null
  void* out;              // (rows, outputs)
};

// A row's result depends neither on the other rows nor on the number of threads, to the last bit.
ALITOK_DECLARE_PER_ISA(void int8_linear_cpu(const Int8LinearParams&, const Parallel&));

}  // namespace alitok
