// Torch's thread pool as a Parallel. Glue only: kernels see parallel.h.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include "parallel.h"

namespace alitok {

inline Parallel torch_parallel() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return {static_cast<int>(threads),
          [](int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* ctx) {
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, fn, ctx));
          }};
}

}  // namespace alitok
