// Torch's thread pool as a Parallel. Glue only: kernels see parallel.h.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdlib>

#include "parallel.h"
#include "threads.h"

namespace alitok {

inline int torch_threads() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return static_cast<int>(threads);
}

// As they were when this library was loaded.
inline const int threads_at_load = torch_threads();
inline const bool threads_in_environment =
    std::getenv("OMP_NUM_THREADS") != nullptr || std::getenv("MKL_NUM_THREADS") != nullptr;

// Torch's own number is that of the machine's cores, which a container's quota or an affinity may not leave: then no more
// than those. A number that was chosen since (torch.set_num_threads), or in the environment, counts as it is.
inline int chosen_threads() {
  const int threads = torch_threads();
  return threads_in_environment || threads != threads_at_load ? threads : std::min(threads, usable_cpus());
}

inline Parallel torch_parallel() {
  return {chosen_threads(), [](int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void*),
                               void* ctx) { TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, fn, ctx)); }};
}

}  // namespace alitok
