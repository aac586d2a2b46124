"""The most that this machine does, measured in the run whose results are compared with it."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from machine import BUSY, OthersMonitor

SOURCE = Path(__file__).with_name("ceilings.cpp")
LONGEST = 2.0  # seconds: without 8-bit dot products (VNNI, AMX) torch multiplies int8 in a plain loop


@dataclass(frozen=True)
class Ceilings:
    """Per second, with all of torch's threads or the whole GPU."""

    fp32_flops: float
    """CPU: fused multiply-adds in registers. CUDA: torch's best float32 matrix product, without TF32."""
    bf16_flops: float
    """torch's best bfloat16 matrix product; on the CPU AVX-512's dot products in registers, where those are more."""
    int8_flops: float
    """The same of int8, operations counted as for floats; not below bf16_flops."""
    read_bytes: float
    """Reading main memory, at the beginning. Shares are of what it is between rounds: on shared hosts it varies."""

    to_dict = asdict

    def __or__(self, other: Ceilings) -> Ceilings:
        """The higher of each: what a neighbour took away in one measurement, the other may have had."""
        return Ceilings(**{name: max(value, getattr(other, name)) for name, value in asdict(self).items()})


def at_rest(
    measure: Callable[[], Ceilings], tries: int, others: Callable[[], OthersMonitor] = OthersMonitor
) -> Ceilings:
    """The highest of up to `tries` measurements, which end with one that no other process disturbed.

    Ceilings that are too low would make every share of them too high, in all benchmarks that follow.
    """
    best = None
    for _ in range(tries):
        with others() as busy:
            measured = measure()
        best = measured if best is None else best | measured
        if (busy.cores or 0.0) <= BUSY:
            break
    return best


def measure_ceilings(device: torch.device) -> Ceilings:
    """Takes about five seconds. On the CPU it needs a C++ compiler, as building the extension does."""
    bf16 = _matmul_flops(device, torch.bfloat16)
    int8 = max(bf16, _matmul_flops(device, torch.int8))
    if device.type == "cpu":
        program = _cpu_program()
        fp32, read_bytes = program.pop("fp32_flops"), program.pop("read_bytes")
        return Ceilings(fp32, bf16, int8, read_bytes) | Ceilings(fp32, read_bytes=read_bytes, **program)
    return Ceilings(_matmul_flops(device, torch.float32), bf16, int8, _cuda_read_bytes(device))


def read_bytes(device: torch.device) -> float:
    """Bytes a second that reading main memory gives at this moment; takes a third of a second."""
    return _cpu_program("memory")["read_bytes"] if device.type == "cpu" else _cuda_read_bytes(device)


def _cpu_program(*arguments: str) -> dict[str, float]:
    command = [_compiled(), str(torch.get_num_threads()), *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@functools.cache
def _compiled() -> str:
    compiler = shutil.which("c++")
    if compiler is None:
        raise RuntimeError("c++: expected a C++ compiler on PATH, found none")
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    program = str(Path(folder.name) / "ceilings")
    flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", program], check=True)
    return program


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    best = 0.0
    for size in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        if dtype == torch.int8:
            b = b.t()  # the only layout that cuBLAS has on every GPU
        multiply, sums = (torch._int_mm, torch.int32) if dtype == torch.int8 else (torch.mm, dtype)
        out = torch.empty(size, size, device=device, dtype=sums)
        seconds = _best_seconds(functools.partial(multiply, a, b, out=out), device)
        best = max(best, 2 * size**3 / seconds)
        if 8 * seconds > LONGEST:  # as the next size takes, at least
            break
    return best


def _cuda_read_bytes(device: torch.device) -> float:
    memory = torch.ones(2**30, device=device)
    return memory.nbytes / _best_seconds(memory.sum, device)


def _best_seconds(function, device: torch.device, rounds: int = 15) -> float:
    """Of so many rounds, or of as many as fit in `LONGEST`, and at least one."""
    times: list[float] = []
    while len(times) < rounds and sum(times) < LONGEST:
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
