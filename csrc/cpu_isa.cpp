#include "cpu_isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
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

Detected chosen() {
  const Detected& machine = detected();
  const char* asked = std::getenv("ALITOK_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return machine;
  for (const Level& level : levels) {
    if (std::strcmp(asked, level.name) != 0) continue;
    if (level.isa > machine.isa || (level.amx && !machine.amx)) {
      throw std::runtime_error(std::string("ALITOK_CPU_ISA: expected at most ") +
                               (machine.amx ? "amx" : name(machine.isa)) + " on this machine, got " + asked);
    }
    return {level.isa, level.amx};
  }
  throw std::runtime_error(std::string("ALITOK_CPU_ISA: expected scalar, avx2, avx512 or amx, got ") + asked);
}

}  // namespace

CpuIsa cpu_isa() { return chosen().isa; }
bool cpu_has_amx() { return chosen().amx; }
CpuIsa detected_cpu_isa() { return detected().isa; }
bool detected_amx() { return detected().amx; }
const char* name(CpuIsa isa) { return levels[static_cast<int>(isa)].name; }

}  // namespace alitok
