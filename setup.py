"""Drives CMakeLists.txt, which lists the sources and flags. Project metadata is in pyproject.toml.

Environment variables:
    ALITOK_CUDA: 0 builds without CUDA kernels, 1 requires them; by default they are built when nvcc is found.
    CMAKE_CUDA_ARCHITECTURES, TORCH_CUDA_ARCH_LIST: GPUs to build for (default: sm_80, sm_90 and PTX).
    MAX_JOBS: compilations at a time (default: by cores and free memory).
    ALITOK_TORCH: folder of the torch package to build against (default: the one that is installed).
    CMAKE_ARGS: further arguments to CMake.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))
from build_backend import find_torch  # noqa: E402

GIB_PER_JOB = 2.0  # nvcc's largest compilation, measured with room to spare


def jobs() -> int:
    """Compilations at a time: MAX_JOBS, or what the cores of this process and the free memory allow."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return cores
    return max(1, min(cores, int(free_kib / 2**20 / GIB_PER_JOB)))


def cuda_mode() -> str:
    modes = {"": "AUTO", "0": "OFF", "1": "ON"}
    value = os.environ.get("ALITOK_CUDA", "")
    if value not in modes:
        raise SystemExit(f"ALITOK_CUDA: expected 0 or 1, got {value!r}")
    return modes[value]


class FreshBuild(build):
    """Collects the files of a wheel anew: one that was deleted from the sources must not linger."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures and builds in build/, which is kept, so that a rebuild compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit("alitok_fast needs torch >= 2.10 to build against: pip install torch, then try again")
        missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        if missing:
            raise SystemExit(f"alitok_fast needs {' and '.join(missing)} to build: pip install {' '.join(missing)}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-torch{torch.version}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # that of the last build may be gone: isolated builds
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DALITOK_TORCH={torch.folder}",
            f"-DALITOK_VERSION={self.distribution.get_version()}",
            f"-DALITOK_CUDA={cuda_mode()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder), "-j", str(jobs())], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not written in place: a process that has the old file loaded must keep it.
        staged = target.with_suffix(".new")
        self.copy_file(str(folder / target.name), str(staged))
        os.replace(staged, target)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("alitok_fast._C", sources=[])],
        cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
    )
