// How a kernel runs on threads without knowing torch: the glue fills this in (torch_parallel.h), so that kernels share
// torch's thread pool and obey torch.set_num_threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace alitok {

struct Parallel {
  int threads;
  void (*run)(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* ctx);

  // f(begin, end) on disjoint ranges that cover [begin, end), at most `threads` of them, none shorter than `grain` unless
  // it is the only one. f throws nothing: what it works with is allocated before (scratch.h). Not nested: inside f it runs on the calling thread alone.
  template <class F>
  void operator()(int64_t begin, int64_t end, int64_t grain, const F& f) const {
    run(
        begin, end, std::max(grain, (end - begin + threads - 1) / threads),
        [](int64_t first, int64_t last, void* ctx) { (*static_cast<const F*>(ctx))(first, last); },
        const_cast<void*>(static_cast<const void*>(std::addressof(f))));
  }
};

// How many of `count` to take at a time: at most `most`, and the same number each time but the last; 0 of 0.
inline int64_t even_parts(int64_t count, int64_t most) {
  const int64_t passes = std::max<int64_t>(1, (count + most - 1) / most);
  return (count + passes - 1) / passes;
}

}  // namespace alitok
