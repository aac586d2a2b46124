// quantized_linear: x W^T + bias for few rows x, with W in 8 bits and a scale for each output and group of 64 inputs.
// The definition is quantized_linear_reference in alitok_fast/ops/quantized_linear.py.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "parallel.h"

namespace alitok {

enum class QuantizedLinearDtype : int { float32, bfloat16, float16, int8, e4m3 };

struct QuantizedLinearParams {
  QuantizedLinearDtype dtype;         // of x, bias and out: the first three
  QuantizedLinearDtype weight_dtype;  // int8 or e4m3
  int64_t rows, inputs, outputs;      // rows up to kQuantizedLinearMostRows, outputs below 2^31
  const void* x;                      // (rows, inputs) contiguous
  const void* weight;                 // (outputs, inputs) contiguous
  const void* scale;                  // (outputs, ceil(inputs / kQuantizedLinearGroup)) bfloat16, contiguous
  const void* bias;                   // (outputs), or null
  void* out;                          // (rows, outputs)
};

// W itself, each weight times its scale and rounded once.
struct WidenParams {
  QuantizedLinearDtype dtype;         // of out: float32, bfloat16 or float16
  QuantizedLinearDtype weight_dtype;  // int8 or e4m3
  int64_t inputs, outputs;            // outputs below 2^31
  const void* weight;                 // (outputs, inputs) contiguous
  const void* scale;                  // (outputs, ceil(inputs / kQuantizedLinearGroup)) bfloat16, contiguous
  void* out;                          // (outputs, inputs)
};

constexpr int64_t kQuantizedLinearGroup = 64;

// CUDA: 16 rows a block at most, along a side of the grid that ends at 65535. More than a few rows are better served by a
// matrix product with the weights written out.
constexpr int64_t kQuantizedLinearMostRows = int64_t{65535} * 16;

ALITOK_DECLARE_PER_ISA(void quantized_linear_cpu(const QuantizedLinearParams&, const Parallel&));
void quantized_linear_cuda(const QuantizedLinearParams&, void* stream);
void widen_cuda(const WidenParams&, void* stream);

}  // namespace alitok
