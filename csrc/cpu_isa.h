// Which instructions this machine has, and the choice among a kernel's per-instruction-set builds at run time.
//
// CMake compiles <op>_cpu.cpp once per instruction set with -DALITOK_ISA=scalar|avx2|avx512, and the file puts its code
// in `namespace alitok::ALITOK_ISA`. Everything else is compiled for the baseline of the architecture.
#pragma once

#include <string>

namespace alitok {

enum class CpuIsa {
  scalar,
  avx2,    // with FMA and F16C
  avx512,  // F, BW, VL, DQ, BF16 and VNNI
};

// The best set of this machine, or the one named by the environment variable ALITOK_CPU_ISA (scalar, avx2, avx512 or
// amx), which is read once, when the library is loaded.
// Throws std::runtime_error where it names something unknown or something that this machine lacks.
CpuIsa cpu_isa();

// From now on another level than that, so that one process of tests can go through all of them; "" goes back to it.
// Not while an operator runs. Throws as cpu_isa().
void set_cpu_isa(const std::string& level);

// AMX tiles with bf16 and int8, usable in this process. False where a level other than amx was asked for.
// Kernels ask here before they call a function with __attribute__((target("amx-tile,amx-bf16"))).
bool cpu_has_amx();

// What the machine has, whatever was asked for.
CpuIsa detected_cpu_isa();
bool detected_amx();

const char* name(CpuIsa isa);

}  // namespace alitok

// Inside namespace alitok: ALITOK_DECLARE_PER_ISA(void vq_lookup_cpu(const VqLookupParams&, const Parallel&));
// In the glue: ALITOK_DISPATCH_ISA(vq_lookup_cpu, params, parallel);
#if defined(__x86_64__)
#define ALITOK_DECLARE_PER_ISA(...) \
  namespace scalar {                \
  __VA_ARGS__;                      \
  }                                 \
  namespace avx2 {                  \
  __VA_ARGS__;                      \
  }                                 \
  namespace avx512 {                \
  __VA_ARGS__;                      \
  }                                 \
  static_assert(true, "takes a semicolon")
#define ALITOK_DISPATCH_ISA(function, ...)                                           \
  [&] {                                                                              \
    switch (::alitok::cpu_isa()) {                                                   \
      case ::alitok::CpuIsa::avx512: return ::alitok::avx512::function(__VA_ARGS__); \
      case ::alitok::CpuIsa::avx2: return ::alitok::avx2::function(__VA_ARGS__);     \
      default: return ::alitok::scalar::function(__VA_ARGS__);                       \
    }                                                                                \
  }()
#else
#define ALITOK_DECLARE_PER_ISA(...) \
  namespace scalar {                \
  __VA_ARGS__;                      \
  }                                 \
  static_assert(true, "takes a semicolon")
#define ALITOK_DISPATCH_ISA(function, ...) ::alitok::scalar::function(__VA_ARGS__)
#endif
