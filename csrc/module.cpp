// The Python module. It sees nothing of torch, and is compiled without TORCH_TARGET_VERSION: torch's copy of pybind11, whose
// headers are used here, refuses to be included beside it in some releases (2.11).
#include <pybind11/pybind11.h>

#include "cpu_isa.h"
#include "threads.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of alitok_fast. Importing it registers torch.ops.alitok.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = ALITOK_VERSION;
    info["compiler"] = ALITOK_COMPILER;
    info["torch"] = ALITOK_TORCH_VERSION;        // headers at build time; runs with this or any later release
    info["torch_target"] = ALITOK_TORCH_TARGET;  // the oldest release that the binary runs with
    info["cpu_isas"] = ALITOK_ISAS;              // comma-separated
    info["cuda"] = ALITOK_CUDA_VERSION;          // toolkit, or empty
    info["cuda_archs"] = ALITOK_CUDA_ARCHS;      // comma-separated, or empty
    return info;
  });
  m.def("cpu_isa", [] { return alitok::name(alitok::cpu_isa()); }, "Instruction set in use: scalar, avx2 or avx512.");
  m.def("set_cpu_isa", &alitok::set_cpu_isa,
        "Use scalar, avx2, avx512 or amx from now on; \"\" is what ALITOK_CPU_ISA said at import. For tests.");
  m.def("cpu_has_amx", &alitok::cpu_has_amx, "Whether kernels use AMX tiles.");
  m.def(
      "detected_cpu_isa", [] { return alitok::name(alitok::detected_cpu_isa()); },
      "Best instruction set of this machine.");
  m.def("cpu_quota", &alitok::cpu_quota, pybind11::arg("root") = "",
        "CPUs that control groups leave this process; 0 for no limit.");
  m.def("usable_cpus", &alitok::usable_cpus, "CPUs that this process may use, by affinity and quota.");
  m.def("detected_amx", &alitok::detected_amx, "Whether this machine and kernel offer AMX tiles.");
}
