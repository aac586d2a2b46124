"""Drives CMakeLists.txt, which lists the sources and flags. Project metadata is in pyproject.toml.

Environment variables:
    ALITOK_CUDA: 0 builds without CUDA kernels, 1 requires them; by default they are built where torch has CUDA and nvcc
        is found. What was decided and why is one line of the output.
    CMAKE_CUDA_ARCHITECTURES, TORCH_CUDA_ARCH_LIST: GPUs to build for (default: sm_80, sm_90 and PTX).
    MAX_JOBS: compilations at a time (default: by cores and free memory).
    ALITOK_TORCH: folder of the torch package to build against (default: the one that is installed).
    CMAKE_ARGS: further arguments to CMake.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))
from build_backend import find_torch  # noqa: E402

GIB_PER_JOB = 2.0  # nvcc's largest compilation, measured with room to spare
TOOLS = {"cc": "CC", "c++": "CXX", "nvcc": "CUDACXX"}
KEPT_BY_CMAKE = ("CUDA_HOME", "CUDAHOSTCXX", "CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS", "CMAKE_ARGS")


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


def surroundings(folder: Path) -> dict[str, str | None]:
    """What CMake's cache in `folder` keeps from the first time on: a cache made under other ones must not be used."""
    tools = {name: shutil.which(os.environ.get(variable) or name) for name, variable in TOOLS.items()}
    settings = {name: os.environ.get(name) for name in KEPT_BY_CMAKE}
    return {"source": str(ROOT), "folder": str(folder), **tools, **settings}


def start_anew_where_stale(folder: Path) -> None:
    """Removes a build folder that was made elsewhere (the checkout was moved or copied), or with other compilers."""
    stamp, now = folder / "surroundings.json", surroundings(folder)
    if (folder / "CMakeCache.txt").exists():
        before = json.loads(stamp.read_text()) if stamp.is_file() else {}
        if changed := [name for name, value in now.items() if before.get(name, "") != value]:
            say(f"{folder.name}: started anew, because {', '.join(changed)} changed")
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(now, indent=1) + "\n")


def say(text: str) -> None:
    print(f"alitok_fast: {text}", flush=True)  # flushed, to stand before what cmake prints


def strip(library: Path) -> None:
    """Leaves out names that only debuggers use, a tenth of a CPU build. The file in build/ keeps them."""
    tool = shutil.which("strip")
    if tool is None:
        say(f"{library.name} is not stripped: there is no strip")
    else:
        subprocess.run([tool, "-x" if sys.platform == "darwin" else "--strip-unneeded", str(library)], check=True)


class CMakeBuild(build_ext):
    """Configures and builds in build/, which is kept, so that a rebuild compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit("alitok_fast needs torch >= 2.10 to build against: pip install torch, then try again")
        missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        if missing:
            raise SystemExit(f"alitok_fast needs {' and '.join(missing)} to build: pip install {' '.join(missing)}")
        begin = time.monotonic()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-torch{torch.version}"
        start_anew_where_stale(folder)
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
        say(f"compiling, {jobs()} at a time; the first time takes minutes")
        subprocess.run(["cmake", "--build", str(folder), "-j", str(jobs())], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not written in place: a process that has the old file loaded must keep it.
        staged = target.with_suffix(".new")
        self.copy_file(str(folder / target.name), str(staged))
        if not re.search(r"^CMAKE_BUILD_TYPE:\w+=.*Deb", (folder / "CMakeCache.txt").read_text(), re.MULTILINE):
            strip(staged)
        os.replace(staged, target)
        say(f"{target.name}, {target.stat().st_size / 1e6:.1f} MB, after {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("alitok_fast._C", sources=[])],
        cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
    )
