// int8_linear: a linear layer with both factors rounded to 8 bits. CPU only.
// The definition is int8_linear_reference in alitok_fast/ops/int8_linear.py.
#pragma once

#include "packed_linear.h"

namespace alitok {

// The weights lie in panels of kInt8PanelOutputs outputs, and a panel in groups of kInt8GroupInputs inputs. A group is
// (inputs / 4, outputs, 4) bytes w + 128 with w in -127..127, then a float32 scale for each output.
// What is missing to whole panels and groups is zero, with a scale of zero.
constexpr int64_t kInt8PanelOutputs = 32;
constexpr int64_t kInt8GroupInputs = 64;
constexpr int64_t kInt8GroupBytes = kInt8PanelOutputs * (kInt8GroupInputs + 4);

}  // namespace alitok
