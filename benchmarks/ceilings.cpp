// What this machine's cores can do at most, in one JSON line: fused multiply-adds in registers, dot products of pairs of
// bf16 and of fours of int8 there (0 without AVX-512's instructions for them), and reads from main memory.
// usage: ceilings THREADS [memory]      with "memory" nothing else
// Compiled by ceilings.py with -march=native. Every figure is the best of several short windows in which all threads
// run at once, so that a busy neighbour lowers it only when it never pauses.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;
constexpr int kChains = 10;  // independent: enough to hide the latency of two units
constexpr int kWindows = 64;
constexpr size_t kHugePage = size_t{2} << 20;
volatile float sink;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Work done per second by all threads together, the best of kWindows windows.
template <class Work>
double best_rate(int threads, double work_of_one, const Work& work) {  // work(thread, window)
  double best = 0;
  for (int window = 0; window < kWindows; ++window) {
    std::atomic<int> ready{0};
    std::vector<double> begin(threads), end(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        ++ready;
        while (ready < threads) {
        }
        begin[t] = seconds();
        work(t, window);
        end[t] = seconds();
      });
    }
    for (std::thread& thread : pool) thread.join();
    const double elapsed = *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
    best = std::max(best, threads * work_of_one / elapsed);
  }
  return best;
}

double fma_per_second(int threads) {
  constexpr int64_t kSteps = 500'000;
  volatile float factor = 0.5f, term = 0.25f;
  return best_rate(threads, 2.0 * kLanes * kChains * kSteps, [&](int, int) {
    Vec a[kChains], b = Vec{} + factor, c = Vec{} + term;
    // Each starts elsewhere: of chains that are equal the compiler keeps one.
    for (int j = 0; j < kChains; ++j) a[j] = c + static_cast<float>(j);
    for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
      for (Vec& chain : a) chain = chain * b + c;
    }
    Vec sum{};
    for (const Vec& chain : a) sum += chain;
    sink = sum[0];
  });
}

// Operations per second of an instruction that adds `products` products to each of kLanes sums.
template <class Instruction>
double dot_per_second(int threads, int products, const Instruction& instruction) {
  constexpr int64_t kSteps = 500'000;
  return best_rate(threads, 2.0 * kLanes * products * kChains * kSteps, [&](int, int) {
    Vec a[kChains];
    const Vec b = Vec{} + 1.0f;
    for (int j = 0; j < kChains; ++j) a[j] = b * static_cast<float>(j);
    for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
      for (Vec& chain : a) chain = instruction(chain, b);
    }
    Vec sum{};
    for (const Vec& chain : a) sum += chain;
    sink = sum[0];
  });
}

double bf16_per_second([[maybe_unused]] int threads) {
#if defined(__AVX512BF16__)
  return dot_per_second(threads, 2, [](Vec sum, Vec x) {
    asm("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(x));
    return sum;
  });
#else
  return 0;
#endif
}

double int8_per_second([[maybe_unused]] int threads) {
#if defined(__AVX512VNNI__)
  return dot_per_second(threads, 4, [](Vec sum, Vec x) {
    asm("vpdpbusd %1, %1, %0" : "+v"(sum) : "v"(x));
    return sum;
  });
#else
  return 0;
#endif
}

double bytes_per_second(int threads) {
  constexpr int64_t kWindow = (int64_t{16} << 20) / kBytes;  // read by one thread in one window
  constexpr int kParts = 16;  // windows read different memory, 256 MiB a thread in all: beyond the caches
  const size_t count = static_cast<size_t>(threads) * kParts * kWindow;
  // In huge pages, as the packed weights are: otherwise looking up addresses, not the memory, is what is measured.
  Vec* const memory = static_cast<Vec*>(std::aligned_alloc(kHugePage, count * kBytes));
  if (memory == nullptr) std::abort();
#if defined(__linux__)
  madvise(memory, count * kBytes, MADV_HUGEPAGE);
#endif
  std::fill_n(memory, count, Vec{} + 1.0f);
  const double best = best_rate(threads, static_cast<double>(kWindow) * kBytes, [&](int t, int window) {
    const Vec* begin = memory + (int64_t{t} * kParts + window % kParts) * kWindow;
    Vec sums[8] = {};
    for (int64_t i = 0; i < kWindow; i += 8) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sums[j] += begin[i + j];
    }
    Vec sum{};
    for (const Vec& part : sums) sum += part;
    sink = sum[0];
  });
  std::free(memory);
  return best;
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::printf("{");
  if (argc < 3) {
    std::printf("\"fp32_flops\": %.4g, \"bf16_flops\": %.4g, \"int8_flops\": %.4g, ", fma_per_second(threads),
                bf16_per_second(threads), int8_per_second(threads));
  }
  std::printf("\"read_bytes\": %.4g}\n", bytes_per_second(threads));
}
