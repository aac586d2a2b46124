"""What a report says about the machine: names, versions, and on a GPU its clocks, power and throttling."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch

from alitok_fast.info import info

PACKAGES = ("torch", "numpy", "pytest-benchmark", "diffusers", "triton", "flash-attn", "nvidia-ml-py")
SAMPLE_SECONDS = 0.25
BUSY = 0.2  # cores that other processes had: more, and what was timed meanwhile is wrong
PROC_STAT = Path("/proc/stat")
TICKS = 100  # a second, of /proc/stat: sysconf(_SC_CLK_TCK) on every Linux
THROTTLE_REASONS = {  # NVML's bits
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
}


def describe(device: torch.device) -> dict[str, Any]:
    """The machine as plain values (JSON). Nothing in it names a person, a host or a folder."""
    values = info()
    cpu = values["cpu"]
    described = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu["model"],
        "cpu": {key: cpu[key] for key in ("model", "cores", "isa", "amx")},
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": values["python"],
        "platform": values["platform"],
        "alitok_fast": values["alitok_fast"],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if device.type == "cuda":
        described["cuda"] = {"driver": values["cuda"]["driver"], "torch": values["cuda"]["torch"]}
    return described


def slug(machine: dict[str, Any]) -> str:
    """A folder's name: amd-epyc-2-threads, nvidia-h100-80gb-hbm3."""
    name = machine["name"] if machine["device"] == "cuda" else f"{machine['name']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", name.lower())).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class OthersMonitor:
    """How many cores other processes kept busy inside a `with` block; `cores` is None where /proc/stat cannot tell."""

    cores: float | None = None

    def __enter__(self) -> OthersMonitor:
        self._begin = self._now()
        return self

    def __exit__(self, *_) -> None:
        elapsed, others = (after - before for after, before in zip(self._now(), self._begin, strict=True))
        if elapsed > 10 / TICKS:  # the kernel counts in ticks
            self.cores = max(0.0, others / elapsed)

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds so far, and processor seconds of everything but this process and what it has started and ended."""
        if not PROC_STAT.is_file():
            return 0.0, 0.0
        user, nice, system, _, _, irq, softirq, steal = (int(x) for x in PROC_STAT.read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / TICKS
        return time.monotonic(), busy - sum(os.times()[:4])


class GpuMonitor:
    """Samples a GPU inside a `with` block; `summary` is what it saw, None on the CPU.

    A container or a part of a GPU may refuse all readings or some, and nvidia-ml-py may be missing: timing goes on, and
    `unread` in the summary says what could not be read and why.
    """

    def __init__(self, device: torch.device) -> None:
        self.values: dict[str, list[float]] = {}
        self.reasons = 0
        self.unread: dict[str, str] = {}
        self._nvml = self._handle = self._thread = None
        self._watches = device.type == "cuda"
        self._stop = threading.Event()
        if self._watches:
            self._open(device)

    def _open(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            self.unread["everything"] = "nvidia-ml-py is not installed: pip install nvidia-ml-py"
            return
        try:
            pynvml.nvmlInit()
            self._nvml = pynvml
            uuid = str(torch.cuda.get_device_properties(device).uuid)  # CUDA's numbering is not NVML's
            self._handle = _device(pynvml, uuid)
        except pynvml.NVMLError as error:
            self.unread["everything"] = f"NVML: {error}"

    def __enter__(self) -> GpuMonitor:
        if self._handle is not None:
            self._sample()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._sample()
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    @property
    def summary(self) -> dict[str, Any] | None:
        """Plain values (JSON): for each reading its value before, median, least and most; `throttling` None: unread."""
        if not self._watches:
            return None
        watched = {
            name: {"before": values[0], "median": statistics.median(values), "least": min(values), "most": max(values)}
            for name, values in self.values.items()
        }
        known = not {"everything", "throttling"} & self.unread.keys()
        return {
            **watched,
            "samples": max(map(len, self.values.values()), default=0),
            "throttling": throttle_reasons(self.reasons) if known else None,
            "unread": dict(self.unread),
        }

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        for name, read in READINGS.items():
            if name in self.unread:
                continue
            try:
                value = read(self._nvml, self._handle)
            except self._nvml.NVMLError as error:
                self.unread[name] = f"NVML: {error}"
                continue
            if name == "throttling":
                self.reasons |= value
            else:
                self.values.setdefault(name, []).append(value)


READINGS = {
    "sm_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "celsius": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "throttling": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
}


def _device(nvml, uuid: str):
    """NVML's handle. CUDA may leave the kind out, and a part of a GPU (MIG) has an identity of its own."""
    if uuid.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def throttle_reasons(bits: int) -> list[str]:
    """NVML's reasons for clocks below the highest, in words; idle is none."""
    return [name for bit, name in THROTTLE_REASONS.items() if bits & bit and name != "idle"]
