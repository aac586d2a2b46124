#include "cpu_isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace alitok {
namespace {

struct Detected {
  CpuIsa isa = CpuIsa::scalar;
  bool amx = false;
};

#if defined(__x86_64__)

// The registers that the operating system saves on a context switch; without that an instruction set is unusable.
uint64_t enabled_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low | static_cast<uint64_t>(high) << 32;
}

// Linux hands out the 8 KiB of tile registers on request only. The grant is for the process, threads included.
bool request_amx_tiles() {
#if defined(__linux__)
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}

Detected detect() {
  Detected found;
  uint32_t a, b, c, d, b7, c7, d7, a71;
  const auto bit = [](uint32_t word, int index) { return (word >> index & 1) != 0; };
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!osxsave || !avx || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return found;
  a71 = 0;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);

  const uint64_t state = enabled_state();
  const auto saved = [&](uint64_t mask) { return (state & mask) == mask; };
  const bool avx2 = saved(0x6) && fma && f16c && bit(b7, 5);
  const bool avx512_core = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);     // F, DQ, BW, VL
  const bool avx512 = avx2 && saved(0xe6) && avx512_core && bit(c7, 11) && bit(a71, 5);  // VNNI, BF16
  found.isa = avx512 ? CpuIsa::avx512 : avx2 ? CpuIsa::avx2 : CpuIsa::scalar;
  const bool amx = bit(d7, 22) && bit(d7, 24) && bit(d7, 25);  // BF16, TILE, INT8
  found.amx = avx512 && amx && saved(0x60000) && request_amx_tiles();
  return found;
}

#else

Detected detect() { return {}; }

#endif

const Detected& detected() {
  static const Detected once = detect();
  return once;
}

struct Level {
  const char* name;
  CpuIsa isa;
  bool amx;
};
constexpr Level levels[] = {{"scalar", CpuIsa::scalar, false},
                            {"avx2", CpuIsa::avx2, false},
                            {"avx512", CpuIsa::avx512, false},
                            {"amx", CpuIsa::avx512, true}};

constexpr int kLevels = sizeof(levels) / sizeof(levels[0]), kNotChosen = -1;

// As it was when this library was loaded. Later reads would race with whoever changes the environment, which operators
// cannot keep from doing so: they run without Python's lock.
const std::string asked = [] {
  const char* value = std::getenv("ALITOK_CPU_ISA");
  return std::string(value == nullptr ? "" : value);
}();

std::atomic<int> active{kNotChosen};  // of `levels`

// The level of that name; of an empty one, the best of this machine. `source` is what errors name.
int find_level(const char* source, const std::string& wanted) {
  const Detected& machine = detected();
  const int best = machine.amx ? kLevels - 1 : static_cast<int>(machine.isa);
  if (wanted.empty()) return best;
  for (int i = 0; i < kLevels; ++i) {
    if (wanted != levels[i].name) continue;
    if (i > best) {
      throw std::runtime_error(std::string(source) + ": expected at most " + levels[best].name +
                               " on this machine, got " + wanted);
    }
    return i;
  }
  throw std::runtime_error(std::string(source) + ": expected scalar, avx2, avx512 or amx, got " + wanted);
}

const Level& chosen() {
  int level = active.load(std::memory_order_relaxed);
  if (level == kNotChosen) {
    level = find_level("ALITOK_CPU_ISA", asked);
    active.store(level, std::memory_order_relaxed);
  }
  return levels[level];
}

}  // namespace

CpuIsa cpu_isa() { return chosen().isa; }
bool cpu_has_amx() { return chosen().amx; }
void set_cpu_isa(const std::string& level) { active.store(level.empty() ? kNotChosen : find_level("cpu_isa", level)); }
CpuIsa detected_cpu_isa() { return detected().isa; }
bool detected_amx() { return detected().amx; }
const char* name(CpuIsa isa) { return levels[static_cast<int>(isa)].name; }

}  // namespace alitok
