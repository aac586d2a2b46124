// A grid of CUDA threads on one CPU thread. Every thread of a block is a fiber with a stack of its own; a fiber runs
// until a barrier or a warp-wide instruction, where it waits for the others as it would on a device. Clusters, which most
// often are single blocks, run one after another, the blocks of a cluster side by side. The order of clusters and of
// runnable threads is chosen by a seed, so a kernel that leans on an order fails under some seed; built with
// -fsanitize=thread every fiber is a thread to the race detector and only barriers (__syncthreads, __syncwarp,
// cluster_sync) order memory, so a missing one is found in any order.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The built-in variables: plain globals that the scheduler sets when it switches.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// Static __shared__ arrays, all in one section so that they can be poisoned when a block starts.
extern "C" __attribute__((weak)) unsigned char __start_simt_shared[], __stop_simt_shared[];

#if defined(__x86_64__)
// Save the callee-saved registers on this stack, its top in *from, and go on where `to` left off.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

// A fiber's frames belong to its own stack: code that leaves it is neither inlined nor checked.
#define SIMT_SWITCHES __attribute__((no_sanitize("thread", "address"), noinline))

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMaxSharedBytes = 163 * 1024;  // of a block, compute capability 8.0
constexpr int kMaxCluster = 8;                  // blocks that every device with clusters has room for
constexpr unsigned char kPoison = 0xFF;         // NaN in fp32, fp16 and bf16, -1 in integers

// A meeting point of `expected` fibers. The last one to come wakes the others.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
  std::vector<int> waiting;
};

// One set of lanes that executes warp-wide instructions together. Two sets of slots: a lane may enter the next
// instruction, but not the one after it, before all have read this one's values.
struct Convergence {
  Meeting meeting;
  struct Slot {
    int instruction;
    uint32_t words[8];
  } slots[2][kWarp];
};

struct Copy {
  unsigned char* target;
  const unsigned char* source;  // null: zeros
  int bytes;
};

struct Fiber {
  void* stack = nullptr;
  uint3 index{};
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> open;
#if defined(__x86_64__)
  void* context = nullptr;
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

// A block of the running cluster.
struct Block {
  uint3 index{};
  int unfinished = 0;  // threads
  Meeting barrier;
  std::vector<std::map<uint32_t, Convergence>> warps;  // by lane mask
  unsigned char* dynamic_shared = nullptr;
  char barrier_order = 0, warp_orders[1024 / kWarp];  // only their addresses matter, to the race detector
};

struct Engine {
  uint64_t seed = 0;
  const char* kernel = "(no kernel)";
  std::function<void()> body;
  std::vector<std::unique_ptr<Fiber>> fibers;
  int threads = 0;            // of a block
  int cluster = 1;            // blocks
  Block blocks[kMaxCluster];  // of the cluster; block b has the fibers from number b * threads on
  Meeting cluster_barrier;
  int current = -1;        // index of the running fiber
  Block* block = nullptr;  // that it belongs to
  std::vector<int> runnable;
  std::map<const void*, size_t> allowed_shared;
  std::mt19937_64 random;
  uint64_t bank_conflicts = 0;                             // extra passes that ldmatrix needs, over all launches
  char start_order = 0, end_order = 0, cluster_order = 0;  // as a block's
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
#if defined(__SANITIZE_THREAD__)
  void* scheduler_tsan = nullptr;
#endif
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

inline Engine& engine = *new Engine;  // never destroyed: fibers are still suspended at exit

[[noreturn]] inline void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "simt: kernel %s, block (%u, %u, %u), thread (%u, %u, %u): ", engine.kernel, blockIdx.x,
               blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  std::_Exit(3);
}

// While one lives, the race detector overlooks what this fiber does: the engine's own state is shared by all.
struct Untracked {
#if defined(__SANITIZE_THREAD__)
  Untracked() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  ~Untracked() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
  Untracked() {}
#endif
};

// Plain stores that no sanitizer sees.
__attribute__((no_sanitize("thread", "address"))) inline void poison(volatile unsigned char* begin, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) begin[i] = kPoison;
}

inline void release(char* order) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(order);
#endif
  (void)order;
}
inline void acquire(char* order) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(order);
#endif
  (void)order;
}

// ---- switching -------------------------------------------------------------------------------------------------

SIMT_SWITCHES inline void yield_to_scheduler() {
  Fiber& fiber = *engine.fibers[engine.current];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, engine.scheduler_stack, engine.scheduler_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(engine.scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  simt_switch(&fiber.context, engine.scheduler);
#else
  swapcontext(&fiber.context, &engine.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &engine.scheduler_stack, &engine.scheduler_stack_bytes);
#endif
}

SIMT_SWITCHES inline void resume(int index) {
  Fiber& fiber = *engine.fibers[index];
  engine.current = index;
  engine.block = &engine.blocks[index / engine.threads];
  threadIdx = fiber.index;
  blockIdx = engine.block->index;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  engine.scheduler_tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  simt_switch(&engine.scheduler, fiber.context);
#else
  swapcontext(&engine.scheduler, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void run_body() {
  acquire(&engine.start_order);
  engine.body();
  release(&engine.end_order);
  Untracked untracked;
  Fiber& fiber = *engine.fibers[engine.current];
  if (!fiber.open.empty() || !fiber.committed.empty()) fail("cp.async still under way when the thread ended");
  engine.block->unfinished -= 1;
}

// A fiber outlives its block: it runs one thread, waits, and runs a thread of the next block.
SIMT_SWITCHES inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &engine.scheduler_stack, &engine.scheduler_stack_bytes);
#endif
  for (;;) {
    run_body();
    yield_to_scheduler();
  }
}

inline void add_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fiber->stack == MAP_FAILED) fail("no memory for a stack");
#if defined(__SANITIZE_THREAD__)
  fiber->tsan = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(static_cast<char*>(fiber->stack) + kStackBytes);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->context = top;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack = {fiber->stack, 0, kStackBytes};
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
#endif
  engine.fibers.push_back(std::move(fiber));
}

// ---- scheduling ------------------------------------------------------------------------------------------------

// Seed 0 runs threads first come, first served; 1 always the last to become runnable (one warp races ahead of the
// others as far as it can); others at random.
inline int take_runnable() {
  std::vector<int>& runnable = engine.runnable;
  size_t at = 0;
  if (engine.seed == 1) at = runnable.size() - 1;
  if (engine.seed > 1) at = engine.random() % runnable.size();
  const int index = runnable[at];
  if (engine.seed == 0) {
    runnable.erase(runnable.begin());
  } else {
    runnable[at] = runnable.back();
    runnable.pop_back();
  }
  return index;
}

inline void meet(Meeting& meeting, int expected) {
  meeting.arrived += 1;
  if (meeting.arrived == expected) {
    meeting.arrived = 0;
    meeting.generation += 1;
    engine.runnable.insert(engine.runnable.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
    return;
  }
  meeting.waiting.push_back(engine.current);
  yield_to_scheduler();
}

inline int unfinished() {
  int threads = 0;
  for (int b = 0; b < engine.cluster; ++b) threads += engine.blocks[b].unfinished;
  return threads;
}

inline void report_deadlock() {
  int at_barrier = 0, in_warp = 0;
  for (int b = 0; b < engine.cluster; ++b) {
    at_barrier += static_cast<int>(engine.blocks[b].barrier.waiting.size());
    for (auto& warp : engine.blocks[b].warps) {
      for (auto& [mask, convergence] : warp) in_warp += static_cast<int>(convergence.meeting.waiting.size());
    }
  }
  const int threads = engine.threads * engine.cluster;
  fail(
      "deadlock: of %d threads %d have ended, %d wait at __syncthreads, %d at cluster_sync and %d in a warp-wide "
      "instruction",
      threads, threads - unfinished(), at_barrier, static_cast<int>(engine.cluster_barrier.waiting.size()), in_warp);
}

// A block whose memory is poisoned and whose threads can begin.
inline void prepare_block(int number, uint3 index, size_t shared_bytes) {
  Block& block = engine.blocks[number];
  block.index = index;
  // Exactly as many bytes as asked for, so that the address sanitizer guards both ends.
  if (shared_bytes > 0 && posix_memalign(reinterpret_cast<void**>(&block.dynamic_shared), 128, shared_bytes) != 0) {
    fail("no memory for %zu bytes of shared memory", shared_bytes);
  }
  poison(block.dynamic_shared, shared_bytes);
  block.barrier = Meeting{};
  block.warps.assign((engine.threads + kWarp - 1) / kWarp, {});
  block.unfinished = engine.threads;
  for (int i = 0; i < engine.threads; ++i) {
    const int number_of_fiber = number * engine.threads + i;
    const unsigned x = blockDim.x, y = blockDim.y, n = static_cast<unsigned>(i);
    engine.fibers[number_of_fiber]->index = uint3{n % x, n / x % y, n / (x * y)};
    engine.runnable.push_back(number_of_fiber);
  }
}

// The blocks from `first` on in direction x.
inline void run_cluster(uint3 first, size_t shared_bytes) {
  poison(__start_simt_shared, static_cast<size_t>(__stop_simt_shared - __start_simt_shared));
  engine.runnable.clear();
  engine.cluster_barrier = Meeting{};
  for (int b = 0; b < engine.cluster; ++b) {
    prepare_block(b, uint3{first.x + static_cast<unsigned>(b), first.y, first.z}, shared_bytes);
  }
  release(&engine.start_order);
  while (unfinished() > 0) {
    if (engine.runnable.empty()) report_deadlock();
    resume(take_runnable());
  }
  acquire(&engine.end_order);
  for (int b = 0; b < engine.cluster; ++b) {
    std::free(engine.blocks[b].dynamic_shared);
    engine.blocks[b].dynamic_shared = nullptr;
  }
}

inline void launch(const char* name, const void* kernel, unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes,
                   std::function<void()> body) {
  Untracked untracked;
  engine.kernel = name;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const auto allowed = engine.allowed_shared.find(kernel);
  const size_t limit = allowed == engine.allowed_shared.end() ? 48 * 1024 : allowed->second;
  blockIdx = threadIdx = uint3{};
  if (threads == 0 || threads > 1024) fail("%llu threads a block", static_cast<unsigned long long>(threads));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail("grid (%u, %u, %u)", grid.x, grid.y, grid.z);
  }
  if (shared_bytes > limit) fail("%zu bytes of dynamic shared memory, %zu allowed", shared_bytes, limit);
  if (cluster == 0 || cluster > kMaxCluster || grid.x % cluster != 0) fail("clusters of %u blocks", cluster);
  if (cluster > 1 && threads % kWarp != 0) fail("clusters of partial warps are not emulated");
  engine.body = std::move(body);
  engine.threads = static_cast<int>(threads);
  engine.cluster = static_cast<int>(cluster);
  gridDim = grid;
  blockDim = block;
  while (engine.fibers.size() < threads * cluster) add_fiber();
  const unsigned columns = grid.x / cluster;
  std::vector<uint64_t> clusters(uint64_t{columns} * grid.y * grid.z);
  for (uint64_t i = 0; i < clusters.size(); ++i) clusters[i] = engine.seed == 1 ? clusters.size() - 1 - i : i;
  engine.random.seed(engine.seed);
  if (engine.seed > 1) std::shuffle(clusters.begin(), clusters.end(), engine.random);
  for (const uint64_t i : clusters) {
    run_cluster(uint3{static_cast<unsigned>(i % columns) * cluster, static_cast<unsigned>(i / columns % grid.y),
                      static_cast<unsigned>(i / (uint64_t{columns} * grid.y))},
                shared_bytes);
  }
  engine.kernel = "(no kernel)";
}

// ---- instructions ----------------------------------------------------------------------------------------------

inline int thread() { return engine.current % engine.threads; }  // of the block
inline int lane() { return thread() % kWarp; }

inline void sync_block() {
  release(&engine.block->barrier_order);
  {
    Untracked untracked;
    meet(engine.block->barrier, engine.threads);
  }
  acquire(&engine.block->barrier_order);
}

inline void sync_cluster() {
  release(&engine.cluster_order);
  {
    Untracked untracked;
    meet(engine.cluster_barrier, engine.threads * engine.cluster);
  }
  acquire(&engine.cluster_order);
}

inline unsigned rank_in_cluster() { return static_cast<unsigned>(engine.block - engine.blocks); }

// Where an address in this block's dynamic shared memory lies in that of another block of the cluster. That one must
// have come to the cluster's barrier, or its memory is not there yet, and must not have ended.
inline const void* shared_of_block(const void* mine, unsigned rank) {
  Untracked untracked;
  if (rank >= static_cast<unsigned>(engine.cluster)) fail("shared memory of block %u of the cluster", rank);
  if (engine.cluster_barrier.generation == 0) fail("shared memory of another block before a cluster_sync");
  if (engine.blocks[rank].unfinished < engine.threads) fail("shared memory of a block of which threads have ended");
  return engine.blocks[rank].dynamic_shared + (static_cast<const unsigned char*>(mine) - engine.block->dynamic_shared);
}

enum Instruction { kSyncWarp, kShuffle, kVote, kReduce, kMatch, kLdmatrix, kMma };

// A few words at a time. The address sanitizer's memcpy, which is slow for so few bytes, was a third of the time of kernels
// with matrix instructions.
template <class T>
void copy_words(void* to, const void* from) {
  if constexpr (sizeof(T) % 4 == 0) {
    for (size_t i = 0; i < sizeof(T) / 4; ++i) static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
  } else {
    __builtin_memcpy(to, from, sizeof(T));
  }
}

// What each lane of `mask` brought to this instruction. Like the instructions themselves this orders no memory.
template <class T>
const Convergence::Slot* exchange(Instruction instruction, uint32_t mask, const T& mine) {
  static_assert(sizeof(T) <= sizeof(Convergence::Slot::words));
  Untracked untracked;
  const int warp = thread() / kWarp;
  const int lanes = std::min(kWarp, engine.threads - warp * kWarp);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;  // a last, partial warp
  if (!(mask >> lane() & 1)) fail("the mask %08x of a warp-wide instruction lacks the calling lane", mask);
  Convergence& convergence = engine.block->warps[warp][mask];
  Convergence::Slot* slots = convergence.slots[convergence.meeting.generation & 1];
  slots[lane()].instruction = instruction;
  copy_words<T>(slots[lane()].words, &mine);
  meet(convergence.meeting, __builtin_popcount(mask));
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) && slots[i].instruction != instruction) fail("lanes of a warp meet in different instructions");
  }
  return slots;
}

template <class T>
T value_of(const Convergence::Slot* slots, int lane) {
  Untracked untracked;
  T value;
  copy_words<T>(&value, slots[lane].words);
  return value;
}

inline void sync_warp(uint32_t mask) {
  char* order = &engine.block->warp_orders[thread() / kWarp];
  release(order);
  exchange(kSyncWarp, mask, 0);
  acquire(order);
}

// cp.async: the target is poison until the wait that covers the copy.
inline void copy_async(void* target, const void* source, int bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(target) % bytes || (valid && reinterpret_cast<uintptr_t>(source) % bytes)) {
    fail("cp.async of %d bytes with a misaligned address", bytes);
  }
  std::memset(target, kPoison, bytes);
  Untracked untracked;
  engine.fibers[engine.current]->open.push_back(
      {static_cast<unsigned char*>(target), valid ? static_cast<const unsigned char*>(source) : nullptr, bytes});
}

inline void commit_copies() {
  Untracked untracked;
  Fiber& fiber = *engine.fibers[engine.current];
  fiber.committed.push_back(std::move(fiber.open));
  fiber.open.clear();
}

inline std::vector<Copy> finished_copies(size_t pending) {
  Untracked untracked;
  std::vector<Copy> finished;
  auto& groups = engine.fibers[engine.current]->committed;
  while (groups.size() > pending) {
    finished.insert(finished.end(), groups.front().begin(), groups.front().end());
    groups.erase(groups.begin());
  }
  return finished;
}

inline void wait_copies(size_t pending) {
  for (const Copy& copy : finished_copies(pending)) {
    if (copy.source == nullptr) {
      std::memset(copy.target, 0, copy.bytes);
    } else {
      std::memcpy(copy.target, copy.source, copy.bytes);
    }
  }
}

}  // namespace simt
