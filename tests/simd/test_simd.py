"""csrc/simd.h, compiled for each instruction set with the flags that CMakeLists.txt gives it, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++")


def flags(isa: str) -> list[str]:
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(rf"set\(flags_{isa}\s([^)]*)\)", text)
    words = found.group(1).split() if found else []
    return [flag for word in words for flag in (flags("avx2") if word == "${flags_avx2}" else [word])]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_vectors(cpu_isa: str, tmp_path: Path):
    if cpu_isa == "amx":
        pytest.skip("the vectors of avx512")
    assert bool(flags(cpu_isa)) == (cpu_isa != "scalar")
    program = tmp_path / "simd"
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-w", f"-DALITOK_ISA={cpu_isa}", *flags(cpu_isa), f"-I{ROOT / 'csrc'}"]
        + [str(Path(__file__).with_name("simd.cpp")), "-o", str(program)],
        check=True,
    )
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
