"""Build the CPU kernels with the address and undefined-behaviour sanitizers, and run tests on them.

    python tests/fuzz/sanitize.py [pytest arguments; default: tests/ops tests/fuzz -m "not slow"]

The build has a folder and an extension of its own, build/sanitize; the one that is installed stays as it is. Needs GCC
with libasan and libubsan, as distributions ship it. Prints one line of result, and exits as pytest does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
# Vectors are loaded from memory aligned to an element, through intrinsics whose types say more: not checked.
FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
)


def library(name: str) -> str:
    path = subprocess.run(
        ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{name}: expected GCC's, found none")
    return path


def build() -> Path:
    """The folder to import alitok_fast from: the checkout's modules with this build's extension."""
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD}", "-DALITOK_CUDA=OFF", "-DCMAKE_BUILD_TYPE=None",
        f"-DCMAKE_CXX_FLAGS=-O1 {FLAGS}", f"-DCMAKE_MODULE_LINKER_FLAGS={FLAGS}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    subprocess.run(["cmake", "--build", str(BUILD), "-j", jobs], check=True, stdout=subprocess.DEVNULL)
    package = BUILD / "package" / "alitok_fast"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "alitok_fast").iterdir():
        if not path.name.startswith(("_C.", "__pycache__")):
            (package / path.name).symlink_to(path)
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    (package / name).symlink_to(BUILD / name)
    return package.parent


def main() -> int:
    package = build()
    # A program that was not built for it gets the sanitizer beforehand; without libstdc++ it would miss exceptions.
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory until the process ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    code = "import torch, alitok_fast._C as c; print(c.__file__)"
    found = subprocess.run([sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else
                           [sys.executable, "-c", code], env=environment, cwd=BUILD, check=True, capture_output=True,
                           text=True).stdout.strip()  # fmt: skip
    if Path(found).parent != package / "alitok_fast":
        raise SystemExit(f"alitok_fast: expected the one in {package}, imported {found}")
    start = time.monotonic()
    # Not `python -m pytest`, which would put the checkout's own package first.
    run = [
        sys.executable,
        "-c",
        "import sys, pytest; sys.path[:] = [p for p in sys.path if p]; sys.exit(pytest.main())",
    ]
    arguments = sys.argv[1:] or ["tests/ops", "tests/fuzz", "-m", "not slow"]
    result = subprocess.run([*run, "-q", "-x", "-p", "no:cacheprovider", *arguments], env=environment, cwd=ROOT)
    verdict = "nothing found" if result.returncode == 0 else f"failed with status {result.returncode}"
    print(
        f"sanitize: {verdict} by AddressSanitizer and UBSan in {' '.join(arguments)}, {time.monotonic() - start:.0f} s"
    )
    return abs(result.returncode)


if __name__ == "__main__":
    sys.exit(main())
