"""Compiles CUDA kernels as C++ against the SIMT emulation and runs them; see README.md."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "simt"

SANITIZERS = {
    "address": [
        "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
        "-fsanitize-sections=simt_shared",
        "-fno-sanitize-recover=all",
    ],
    "thread": ["-fsanitize=thread"],
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=3",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=3",
    "TSAN_OPTIONS": "exitcode=3:halt_on_error=1:report_signal_unsafe=0",
}


class KernelFailure(AssertionError):
    """The emulation or a sanitizer stopped the kernel; the message is its report."""


@dataclass
class Result:
    outputs: dict[str, torch.Tensor]
    bank_conflicts: int

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.outputs[name]


class Program:
    """One tests/simt/<op>.cpp compiled with one sanitizer."""

    def __init__(self, executable: Path, folder: Path):
        self.executable, self.folder = executable, folder

    def run(
        self,
        inputs: dict[str, torch.Tensor | int | float | bool | None],
        outputs: dict[str, tuple[tuple[int, ...], torch.dtype]],
        schedules: int = 3,
    ) -> Result:
        """Run the case under `schedules` thread orders; None inputs reach the kernel as null pointers."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        scalars = []
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                (self.folder / f"{name}.bin").write_bytes(_to_bytes(value))
            elif value is not None:
                scalars.append(f"{name} {float(value)!r}\n")
        (self.folder / "scalars.txt").write_text("".join(scalars))
        command = [str(self.executable), str(self.folder), str(schedules)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
        if done.returncode != 0:
            raise KernelFailure(f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[:6000]}")
        tensors = {name: _from_bytes(self.folder / f"{name}.out", *spec) for name, spec in outputs.items()}
        return Result(tensors, int(done.stdout.split()[-1]))


class Simt:
    """Builds programs under build/simt, again only when their sources or flags have changed."""

    Failure = KernelFailure

    def __init__(self, folder: Path):
        self.folder = folder  # for the cases

    def program(self, op: str, sanitizer: str = "address", patches: Sequence[tuple[str, str, str]] = ()) -> Program:
        """Each patch is (file in csrc, text that occurs exactly once in it, its replacement), made in a copy."""
        name = f"{op}-{sanitizer}"
        if patches:
            name += "-" + hashlib.sha256(repr(patches).encode()).hexdigest()[:8]
        folder = BUILD / name
        executable, stamp = folder / "program", folder / "sources.sha256"
        state = _source_hash(op, sanitizer)
        if not executable.exists() or not stamp.exists() or stamp.read_text() != state:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            sources = _patched(folder / "csrc", patches) if patches else CSRC
            flags = ["-O0" if patches else "-O1", *SANITIZERS[sanitizer]]  # patched ones are compiled to run once
            _compile(HERE / f"{op}.cpp", executable, [f"-I{HERE}", f"-I{sources}"], flags)
            stamp.write_text(state)
        return Program(executable, self.folder / name)


@pytest.fixture(scope="session")
def simt(tmp_path_factory: pytest.TempPathFactory) -> Simt:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return Simt(tmp_path_factory.mktemp("simt"))


def _source_hash(op: str, sanitizer: str) -> str:
    files = [*HERE.glob("*.h"), *CSRC.glob("*.h"), HERE / f"{op}.cpp", *CSRC.glob("*.cu"), Path(__file__)]
    digest = hashlib.sha256(sanitizer.encode())
    for file in sorted(files):
        if file.suffix != ".cu" or file.name.startswith(op):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


FLAGS = (
    "-std=c++17 -g1 -DALITOK_SIMT -ftrivial-auto-var-init=pattern -fno-strict-aliasing -ffp-contract=off -Wall -Wextra "
    "-Wno-unknown-pragmas -Wno-sign-compare -Wno-maybe-uninitialized -Werror -Winvalid-pch"
).split()


def _compile(source: Path, executable: Path, includes: list[str], flags: list[str]) -> None:
    flags = [*FLAGS, *flags]
    prepared = ["-include", str(_prepared_engine(flags))]
    _run(["g++", *flags, *prepared, *includes, str(source), "-o", str(executable)])


def _prepared_engine(flags: list[str]) -> Path:
    """engine.h, compiled once for these flags: half of the time that a program takes is for this header."""
    engine = HERE / "engine.h"
    compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout  # reads none but its own
    digest = hashlib.sha256(repr((flags, str(engine))).encode() + compiler + engine.read_bytes())
    folder = BUILD / f"engine-{digest.hexdigest()[:16]}"
    header, compiled = folder / engine.name, folder / "engine.h.gch"
    if not compiled.exists():
        folder.mkdir(parents=True, exist_ok=True)
        header.write_text(f'#include "{engine}"\n')
        unfinished = folder / f"{os.getpid()}.gch"
        _run(["g++", *flags, "-x", "c++-header", str(header), "-o", str(unfinished)])
        unfinished.replace(compiled)
    return header


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:6000]}"


def _patched(folder: Path, patches: Sequence[tuple[str, str, str]]) -> Path:
    shutil.copytree(CSRC, folder)
    for name, old, new in patches:
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name}: expected {old!r} once, got it {text.count(old)} times"
        (folder / name).write_text(text.replace(old, new))
    return folder


def _to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _from_bytes(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    content = bytearray(path.read_bytes())
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.view(shape)
