// From a glue function to a CUDA kernel: the device, its current stream, and a clear refusal in a CPU-only build.
// Glue only.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <stdexcept>

#ifdef ALITOK_CUDA
#include <dlfcn.h>
#endif

namespace alitok {

// The cudaStream_t that torch uses on this device now.
inline void* current_cuda_stream(int32_t device_index) {
#ifdef ALITOK_CUDA
  // Only a CUDA build of torch has this function, and the extension must load beside a CPU build too: it is looked up
  // when the first CUDA tensor arrives.
  using Lookup = int32_t (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    if (symbol == nullptr) {
      throw std::runtime_error("libtorch_cuda.so: expected aoti_torch_get_current_cuda_stream, got none");
    }
    return reinterpret_cast<Lookup>(symbol);
  }();
  void* stream = nullptr;
  if (lookup(device_index, &stream) != 0) throw std::runtime_error("cannot read torch's current CUDA stream");
  return stream;
#else
  (void)device_index;
  throw std::runtime_error(
      "alitok_fast: this build has no CUDA kernels; install the CUDA toolkit (nvcc on PATH or CUDA_HOME) and build it "
      "again with ALITOK_CUDA=1");
#endif
}

}  // namespace alitok

// ALITOK_DISPATCH_CUDA(vq_lookup_cuda, z.get_device_index(), params): launch on the current stream of that device.
#ifdef ALITOK_CUDA
#define ALITOK_DISPATCH_CUDA(function, device_index, params)                    \
  do {                                                                          \
    const ::torch::stable::accelerator::DeviceGuard alitok_guard(device_index); \
    function(params, ::alitok::current_cuda_stream(device_index));              \
  } while (0)
#else
#define ALITOK_DISPATCH_CUDA(function, device_index, params) \
  ((void)(params), (void)::alitok::current_cuda_stream(device_index))
#endif
