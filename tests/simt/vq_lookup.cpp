// vq_lookup's CUDA kernels under the emulation: backward when there is a gradient, else forward.
#include "case.h"
#include "vq_lookup_cuda.cu"

namespace {

void forward(simt::Case& test) {
  alitok::VqLookupParams p{};
  p.features = test.integer("features");
  p.codes = test.integer("codes");
  p.channels = test.integer("channels");
  p.commitment = static_cast<float>(test.number("commitment"));
  p.z = test.input<float>("z");
  p.codebook = test.input<float>("codebook");
  p.quantized = test.output<float>("quantized", p.features * p.channels);
  p.indices = test.output<int64_t>("indices", p.features);
  p.loss = test.output<float>("loss", 1);
  p.usage = test.output<int64_t>("usage", p.codes);
  p.closest = test.integer("with_closest") != 0 ? test.output<int64_t>("closest", p.codes) : nullptr;
  p.workspace = test.workspace<unsigned char>(alitok::vq_lookup_workspace_cuda(p));
  alitok::vq_lookup_cuda(p, nullptr);
}

void backward(simt::Case& test) {
  alitok::VqLookupBackwardParams p{};
  p.features = test.integer("features");
  p.codes = test.integer("codes");
  p.channels = test.integer("channels");
  p.commitment = static_cast<float>(test.number("commitment"));
  p.grad_quantized = test.input<float>("grad_quantized");
  p.grad_loss = test.input<float>("grad_loss");
  p.z = test.input<float>("z");
  p.codebook = test.input<float>("codebook");
  p.indices = test.input<int64_t>("indices");
  p.grad_z = test.output<float>("grad_z", p.features * p.channels);
  p.grad_codebook = test.output<float>("grad_codebook", p.codes * p.channels);
  alitok::vq_lookup_backward_cuda(p, nullptr);
}

}  // namespace

void run_case(simt::Case& test) {
  if (test.integer("backward") != 0) {
    backward(test);
  } else {
    forward(test);
  }
}
