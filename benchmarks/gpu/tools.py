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
             "fused_linear", "norm_head", "sample_tokens", "vq_lookup", "add_rms_norm")  # fmt: skip
PROFILED = {  # kernels by the item of gpu.profiled that launches them
    "cached_attention_kernel": "cached_attention",
    "forward_kernel": "prefix_attention",
    "grad_kv_kernel": "prefix_attention",
}
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "launch__registers_per_thread": "registers",
}
PROBES = ("--report-api-errors", "no")  # libraries ask drivers for functions that are not there, and go on
OURS = ("--kernel-regex", "kns=alitok")  # mangled names hold the namespace; torch's own kernels are not the question
items = Items()


def printed(command: Sequence[str]) -> str:
    """What a command prints, which goes into the log line by line: it may be ended before it ends."""
    lines = []
    with subprocess.Popen(
        command, cwd=BENCHMARKS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines)


def under(tool: Sequence[str], module: str, names: Sequence[str], quick: bool = False) -> str:
    """The tool's output over some items of a step, all of which must have passed."""
    if shutil.which(tool[0]) is None:
        raise Skipped(f"{tool[0]} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        command = [*tool, sys.executable, "-m", module, "--device", "cuda", "--record", str(record)]
        output = printed([*command, *(["--quick"] if quick else []), "--items", *names])
        lines = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    failed = [line for line in lines if line.get("state") == "failed"]
    passed = [line for line in lines if line.get("state") == "passed"]
    if failed or len(passed) != len(names):
        reason = failed[0]["reason"] if failed else f"{len(passed)} of {len(names)} items ended"
        raise RuntimeError(f"{' '.join(tool[:3])}: {reason}")
    return output


def faults(output: str, pattern: str) -> int:
    """The number that the sanitizer's last summary names."""
    found = re.findall(pattern, output)
    if not found:
        raise RuntimeError("compute-sanitizer: expected a summary at its end, found none")
    return int(found[-1])


def sanitize(tool: str, summary: str, key: str, options: Sequence[str] = ()) -> list[Number]:
    output = under(["compute-sanitizer", "--tool", tool, *OURS, *options], "gpu.check_operators", SANITIZED, quick=True)
    return [within(key, faults(output, summary), 0, "count", key=key)]


@items("memcheck", gpu=True)
def memcheck(context: Context) -> list[Number]:
    return sanitize("memcheck", r"ERROR SUMMARY: (\d+) error", "memory faults", PROBES)


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


def profile(kernel: str, item: str) -> list[Number]:
    tool = ["ncu", "--csv", "--clock-control", "none", "--kernel-name", kernel, "--launch-count", "3",
            "--metrics", ",".join(METRICS)]  # fmt: skip
    numbers = []
    for row in profiled(under(tool, "gpu.profiled", [item])):
        name = METRICS.get(row["Metric Name"])
        if name is not None:
            value = float(row["Metric Value"].replace(",", ""))
            label = f"launch {row['ID']}, grid {row.get('Grid Size', 'unknown')}: {name}"
            key = f"{kernel}: memory" if name == "memory" and row["ID"] == "0" else ""
            numbers.append(Number(label, value, row["Metric Unit"] or "count", key=key))
    return numbers


for _kernel, _item in PROFILED.items():
    items(f"ncu {_kernel}", gpu=True)(lambda context, kernel=_kernel, item=_item: profile(kernel, item))


if __name__ == "__main__":
    items.main()
