"""Packs a binary for a GPU machine elsewhere, with the golden files: what `make gpu` there needs and need not build.

    python benchmarks/gpu/wheel.py --python python3.12 --torch torch==2.11.0

In an environment of that Python with the headers of that torch (its dependencies are not installed), the extension is
built for one architecture and copied to build/gpu-wheel, which git ignores. `make gpu` takes it from there when it is
for the Python that runs and was made of the same sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu.sources import CARRIED, MANIFEST, kernel_sources  # noqa: E402

MOST_BYTES = 60_000_000


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3.12", help="the interpreter of that machine's version")
    parser.add_argument("--torch", default="torch==2.11.0", help="what pip is asked for; options may follow it")
    parser.add_argument("--architecture", default="90-real", help="as CMAKE_CUDA_ARCHITECTURES (default 90-real)")
    golden = Path(os.environ.get("ALITOK_GOLDEN", ROOT.parent / "shared" / "golden"))
    parser.add_argument("--golden", type=Path, default=golden, help="folder of the golden files")
    return parser.parse_args()


def environment(python: str, torch: str) -> Path:
    """The interpreter of a virtual environment with what a build needs; one is kept for each Python and torch."""
    name = hashlib.sha256(f"{python} {torch}".encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"gpu-wheel-env-{name}"
    interpreter = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        if subprocess.run([python, "--version"], capture_output=True).returncode != 0:
            raise SystemExit(f"--python: expected an interpreter that runs, got {python!r}, which does not")
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(interpreter), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "setuptools>=77", "cmake", "ninja"], check=True)
        subprocess.run([*install, "--no-deps", *shlex.split(torch)], check=True)  # the libraries of CUDA are gigabytes
        (folder / "complete").touch()
    return interpreter


def main() -> None:
    given, begin = options(), time.monotonic()
    if shutil.which(given.python) is None:
        raise SystemExit(f"--python: expected an interpreter on PATH or its file, got {given.python!r}")
    interpreter = environment(given.python, given.torch)
    ready = time.monotonic()
    settings = {
        **os.environ,
        "PATH": f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}",
        "CMAKE_CUDA_ARCHITECTURES": given.architecture,
        "ALITOK_CUDA": "1",
    }
    staged = CARRIED.with_name(f"{CARRIED.name}.new")  # the last one stays until this one is whole
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    build = [str(interpreter), "setup.py", "build_ext", "--build-lib", str(staged)]
    subprocess.run(build, cwd=ROOT, env=settings, check=True)
    built = time.monotonic()
    (binary,) = (staged / "alitok_fast").iterdir()
    binary = binary.rename(staged / binary.name)
    (staged / "alitok_fast").rmdir()
    if given.golden.is_dir():
        shutil.copytree(given.golden, staged / "golden", ignore=shutil.ignore_patterns("__pycache__"))
    about = {"binary": binary.name, "sources": kernel_sources()}
    about |= {"torch": given.torch, "architecture": given.architecture}
    (staged / MANIFEST).write_text(json.dumps(about, indent=1) + "\n")
    size = sum(file.stat().st_size for file in staged.rglob("*") if file.is_file())
    if size >= MOST_BYTES:
        raise SystemExit(f"{CARRIED.name}: expected less than {MOST_BYTES / 1e6:g} MB, got {size / 1e6:.0f}")
    shutil.rmtree(CARRIED, ignore_errors=True)
    staged.rename(CARRIED)
    golden = "and the golden files" if given.golden.is_dir() else f"and no golden files: no folder {given.golden.name}"
    print(f"{CARRIED.relative_to(ROOT)}: {binary.name} for {given.architecture} {golden}, {size / 1e6:.1f} MB; "
          f"environment {ready - begin:.0f} s, build {built - ready:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
