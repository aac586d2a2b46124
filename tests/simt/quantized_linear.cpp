#include "case.h"
#include "quantized_linear_cuda.cu"

namespace {

void widen(simt::Case& test) {
  using alitok::QuantizedLinearDtype;
  alitok::WidenParams p{};
  p.dtype = static_cast<QuantizedLinearDtype>(test.integer("dtype"));
  p.weight_dtype = static_cast<QuantizedLinearDtype>(test.integer("weight_dtype"));
  p.inputs = test.integer("inputs");
  p.outputs = test.integer("outputs");
  p.weight = test.input<char>("weight") + test.integer("offset");
  p.scale = test.input<void>("scale");
  const int64_t element = p.dtype == QuantizedLinearDtype::float32 ? 4 : 2;
  p.out = test.output<unsigned char>("wide", p.outputs * p.inputs * element);
  alitok::widen_cuda(p, nullptr);
}

}  // namespace

void run_case(simt::Case& test) {
  using alitok::QuantizedLinearDtype;
  if (test.integer("rows") == 0) return widen(test);
  alitok::QuantizedLinearParams p{};
  p.dtype = static_cast<QuantizedLinearDtype>(test.integer("dtype"));
  p.weight_dtype = static_cast<QuantizedLinearDtype>(test.integer("weight_dtype"));
  p.rows = test.integer("rows");
  p.inputs = test.integer("inputs");
  p.outputs = test.integer("outputs");
  p.x = test.input<void>("x");
  p.weight = test.input<char>("weight") + test.integer("offset");
  p.scale = test.input<void>("scale");
  p.bias = test.input<void>("bias");
  const int64_t element = p.dtype == QuantizedLinearDtype::float32 ? 4 : 2;
  p.out = test.output<unsigned char>("out", p.rows * p.outputs * element);
  alitok::quantized_linear_cuda(p, nullptr);
}
