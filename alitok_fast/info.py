"""What is installed, what was built, what this machine can use, and why something is off."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from alitok_fast import __version__, _library

OPTIONAL = ("tensorboard", "huggingface_hub", "diffusers", "flash-attn")


def info() -> dict[str, Any]:
    """Versions, build and machine, as plain values (JSON).

    In `extension`, `cpu` and `cuda`, the entry `off` lists in words what cannot be used and why.
    """
    extension = _extension()
    return {
        "alitok_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "extension": extension,
        "cpu": _cpu(extension),
        "cuda": _cuda(extension),
        "optional": {name: _version(name) for name in OPTIONAL},
    }


def report() -> str:
    """`info()` as text."""
    return render(info())


def render(values: dict[str, Any]) -> str:
    extension, cpu, cuda = values["extension"], values["cpu"], values["cuda"]
    lines = [
        f"alitok_fast {values['alitok_fast']}, torch {values['torch']}, Python {values['python']}",
        f"platform    {values['platform']}",
    ]
    if extension["loaded"]:
        toolkit = f"CUDA {extension['cuda']} ({extension['cuda_archs']})" if extension["cuda"] else "no CUDA"
        lines += [
            f"extension   {extension['path']}",
            f"  built     {extension['compiler']}, torch {extension['torch']}"
            f" (runs with {extension['torch_target']} and later), {extension['cpu_isas']}, {toolkit}",
        ]
    else:
        lines.append("extension   not loaded")
    isa = cpu["isa"] + (" with AMX" if cpu["amx"] else "") if cpu["isa"] else "reference operators only"
    lines.append(f"CPU         {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads: {isa}")
    gpus = [f"{gpu['name']} (sm_{gpu['capability']}, {gpu['memory_gib']} GiB)" for gpu in cuda["gpus"]]
    lines.append(f"CUDA        {', '.join(gpus) or 'no GPU'}; driver {cuda['driver'] or 'none'}; "
                 f"torch built for {cuda['torch'] or 'CPU only'}")  # fmt: skip
    present = [f"{name} {version}" for name, version in values["optional"].items() if version]
    absent = [name for name, version in values["optional"].items() if not version]
    lines.append(f"optional    {', '.join(present) or 'none'}; absent: {', '.join(absent) or 'none'}")
    for part in (extension, cpu, cuda):
        lines += [f"off         {reason}" for reason in part["off"]]
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, Any]:
    if _library.load_error is not None:
        return {"loaded": False, "off": [_library.explain(_library.load_error)]}
    from alitok_fast import _C

    build = _C.build_info()
    stale = [] if build["version"] == __version__ else [
        f"extension: built from version {build['version']}, the package is {__version__}; mend it with: "
        f"{_library.REBUILD}"
    ]  # fmt: skip
    return {"loaded": True, "path": _C.__file__, **build, "off": stale}


def _cpu(extension: dict[str, Any]) -> dict[str, Any]:
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    values: dict[str, Any] = {
        "model": model,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "isa": None,
        "amx": False,
        "off": [],
    }
    if not extension["loaded"]:
        return values
    from alitok_fast import _C

    best, best_amx = _C.detected_cpu_isa(), _C.detected_amx()
    values |= {"best_isa": best, "best_amx": best_amx}
    try:
        values |= {"isa": _C.cpu_isa(), "amx": _C.cpu_has_amx()}
    except RuntimeError as error:  # a bad ALITOK_CPU_ISA
        values["off"].append(str(error))
        return values
    built = extension["cpu_isas"].split(",")
    for isa, needs in (("avx512", "F, BW, VL, DQ, BF16, VNNI"), ("avx2", "AVX2, FMA, F16C")):
        if isa in built and built.index(isa) > built.index(best):
            values["off"].append(f"{isa} kernels: this machine lacks one of {needs}")
    if not best_amx and best == "avx512":
        values["off"].append("AMX: this machine or its operating system offers no AMX tiles")
    if (values["isa"], values["amx"]) != (best, best_amx):
        values["off"].append(
            f"{best}{' with AMX' if best_amx else ''}: lowered by ALITOK_CPU_ISA={os.environ.get('ALITOK_CPU_ISA')}"
        )
    return values


def _cuda(extension: dict[str, Any]) -> dict[str, Any]:
    driver = _driver_version()
    gpus: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            gpus.append({
                "name": device.name,
                "capability": f"{device.major}{device.minor}",
                "memory_gib": round(device.total_memory / 2**30),
            })  # fmt: skip
    off = []
    if extension["loaded"] and not extension["cuda"]:
        off.append(
            "CUDA kernels: not built (torch had no CUDA when it was built, or there was no nvcc, or ALITOK_CUDA=0); "
            "install a CUDA build of torch and the CUDA toolkit, and reinstall"
        )
    if torch.version.cuda is None:
        off.append(f"CUDA: torch {torch.__version__} is a CPU build; install a CUDA build of torch")
    if driver is None:
        off.append("CUDA: no driver on this machine (libcuda.so.1 is missing or does not start)")
    elif torch.version.cuda is not None and not gpus:
        off.append(f"CUDA: torch sees no GPU, with driver {driver} (CUDA_VISIBLE_DEVICES? driver older than torch's?)")
    if extension["loaded"] and extension["cuda"]:
        off += too_new(extension["cuda"], torch.version.cuda, driver)
        off += [
            f"CUDA kernels: built for {extension['cuda_archs']}, not for sm_{gpu['capability']} ({gpu['name']}); "
            f"reinstall with CMAKE_CUDA_ARCHITECTURES={gpu['capability']}"
            for gpu in gpus
            if not runs_on(extension["cuda_archs"], gpu["capability"])
        ]
    return {"torch": torch.version.cuda, "driver": driver, "gpus": gpus, "off": off}


def too_new(toolkit: str, torch_cuda: str | None, driver: str | None) -> list[str]:
    """Why kernels built with `toolkit` may not start beside this torch and this driver; all are CUDA versions.

    The toolkit's runtime is part of the extension, and needs a driver of its own major release or a later one.
    """
    major = int(toolkit.partition(".")[0])
    torch_major, driver_major = (
        int(version.partition(".")[0]) if version else major for version in (torch_cuda, driver)
    )
    lowest = min(torch_major, driver_major)
    mend = f"reinstall with CUDA_HOME set to a toolkit of CUDA {lowest}"
    reasons = []
    if driver_major < major:
        reasons.append(f"CUDA kernels: built with CUDA {toolkit}, the driver runs up to {driver}; update it, or {mend}")
    elif torch_major < major:
        reasons.append(
            f"CUDA kernels: built with CUDA {toolkit}, torch for {torch_cuda}: where the driver is just new enough "
            f"for torch they do not start; {mend}"
        )
    return reasons


def runs_on(archs: str, capability: str) -> bool:
    """Whether kernels built for `archs` (CMAKE_CUDA_ARCHITECTURES, comma-separated) run on a GPU of `capability`.

    Machine code ("-real") runs on the same major version from its minor version on, PTX ("-virtual") on all later
    GPUs, an entry without either is both; a letter ("90a") ties it to that GPU alone. CMake's words ("native", "all")
    are taken to fit.
    """
    gpu = int(capability)
    for arch in archs.split(","):
        number, _, kind = arch.partition("-")
        if not number[:1].isdigit():
            return True
        if not number.isdigit():
            if number[:-1] == capability and kind != "virtual":
                return True
            continue
        if kind != "virtual" and int(number) // 10 == gpu // 10 and int(number) <= gpu:
            return True
        if kind != "real" and int(number) <= gpu:
            return True
    return False


def _driver_version() -> str | None:
    """The newest CUDA that the driver supports."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if driver.cuInit(0) != 0 or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
