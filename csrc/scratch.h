// Working memory of the threads of a CPU kernel. It is allocated before they start, so that there is one place where an
// operator can find no memory, and no thread that leaves while others wait for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "float_buffer.h"
#include "parallel.h"

namespace alitok::ALITOK_ISA {

// A T for each call that a parallel loop over `tasks` may make of its body.
template <class T>
class Scratch {
 public:
  template <class... Args>
  Scratch(const Parallel& parallel, int64_t tasks, const Args&... args) {
    const int64_t calls = std::min<int64_t>(parallel.threads, tasks);
    items_.reserve(static_cast<size_t>(std::max<int64_t>(calls, 0)));
    for (int64_t i = 0; i < calls; ++i) items_.push_back(std::make_unique<T>(args...));
  }

  // Once in each call of the body.
  T& take() { return *items_[next_.fetch_add(1, std::memory_order_relaxed)]; }

 private:
  std::vector<std::unique_ptr<T>> items_;
  std::atomic<size_t> next_{0};
};

}  // namespace alitok::ALITOK_ISA
