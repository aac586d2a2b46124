// bf16_linear: a linear layer with packed bfloat16 weights. CPU only.
// The definition is bf16_linear_reference in alitok_fast/ops/bf16_linear.py.
#pragma once

#include "packed_linear.h"

namespace alitok {

// The weights lie in panels of kBf16PanelOutputs outputs, as bf16_blocks.h has the right matrix of a product, and a panel
// in steps of kBf16StepInputs inputs. A step is (2, 16, 16, 2) bfloat16, element (tile, pair, column, half) of output
// 16 tile + column and input 2 pair + half. What is missing to whole panels and steps is zero.
constexpr int64_t kBf16PanelOutputs = 32;
constexpr int64_t kBf16StepInputs = 32;
constexpr int64_t kBf16StepElements = kBf16PanelOutputs * kBf16StepInputs;

}  // namespace alitok
