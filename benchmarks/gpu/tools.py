"""NVIDIA's tools over the operators' checks: compute-sanitizer for faults, Nsight Compute (ncu) for what limits them.

Neither is part of a driver or of torch; where one is missing its items are skipped, by name.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpu.items import Context, Items, Number, Skipped, within

BENCHMARKS = Path(__file__).resolve().parents[1]
SANITIZED = ("cached_attention", "prefix_attention bfloat16", "prefix_attention float32", "quantized_linear",
             "sample_tokens", "vq_lookup", "add_rms_norm")  # fmt: skip
PROFILED = {  # kernels by the item that launches them, at real sizes
    "cached_attention_kernel": "cached_attention",
    "forward_kernel": "prefix_attention bfloat16",
    "grad_kv_kernel": "prefix_attention bfloat16",
}
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "launch__registers_per_thread": "registers",
}
OURS = ("--kernel-regex", "kns=alitok")  # mangled names hold the namespace; torch's own kernels are not the question
items = Items()


def under(tool: Sequence[str], checks: Sequence[str], quick: bool) -> str:
    """The tool's output over some of check_operators' items, all of which must have passed."""
    if shutil.which(tool[0]) is None:
        raise Skipped(f"{tool[0]} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        command = [*tool, sys.executable, "-m", "gpu.check_operators", "--device", "cuda", "--record", str(record)]
        command += ["--items", ",".join(checks), *(["--quick"] if quick else [])]
        done = subprocess.run(command, cwd=BENCHMARKS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        lines = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    failed = [line for line in lines if line.get("state") == "failed"]
    passed = [line for line in lines if line.get("state") == "passed"]
    if failed or len(passed) != len(checks):
        reason = failed[0]["reason"] if failed else f"{len(passed)} of {len(checks)} items ended"
        raise RuntimeError(f"{' '.join(tool[:3])}: {reason}")
    return done.stdout


def faults(output: str, pattern: str) -> int:
    """The number that the sanitizer's last summary names."""
    found = re.findall(pattern, output)
    if not found:
        raise RuntimeError("compute-sanitizer: expected a summary at its end, found none")
    return int(found[-1])


def sanitize(tool: str, summary: str, key: str) -> list[Number]:
    output = under(["compute-sanitizer", "--tool", tool, *OURS], SANITIZED, quick=True)
    return [within(key, faults(output, summary), 0, "count", key=key)]


@items("memcheck", gpu=True)
def memcheck(context: Context) -> list[Number]:
    return sanitize("memcheck", r"ERROR SUMMARY: (\d+) error", key="memory faults")


@items("racecheck", gpu=True)
def racecheck(context: Context) -> list[Number]:
    return sanitize("racecheck", r"RACECHECK SUMMARY: (\d+) hazard", key="races")


def profiled(output: str) -> list[dict[str, str]]:
    """The rows of ncu's CSV, which follows the program's own output and lines of ncu's that begin with ==."""
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise RuntimeError("ncu: expected a table of metrics, found none")
    return list(csv.DictReader(line for line in lines[begin:] if line.startswith('"')))


def profile(kernel: str, check: str) -> list[Number]:
    tool = ["ncu", "--csv", "--clock-control", "none", "--kernel-name", kernel, "--launch-count", "3",
            "--metrics", ",".join(METRICS)]  # fmt: skip
    numbers = []
    for row in profiled(under(tool, [check], quick=False)):
        name = METRICS.get(row["Metric Name"])
        if name is not None:
            value = float(row["Metric Value"].replace(",", ""))
            label = f"launch {row['ID']}, grid {row.get('Grid Size', 'unknown')}: {name}"
            key = f"{kernel}: memory" if name == "memory" and row["ID"] == "0" else ""
            numbers.append(Number(label, value, row["Metric Unit"] or "count", key=key))
    return numbers


for _kernel, _check in PROFILED.items():
    items(f"ncu {_kernel}", gpu=True)(lambda context, kernel=_kernel, check=_check: profile(kernel, check))


if __name__ == "__main__":
    items.main()
