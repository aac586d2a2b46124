"""What has been measured, beside the model: the steps in the committed reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alitok_fast.config import GENERATORS
from costs.cpu import Cpu, cpu_step
from costs.gpu import LAUNCHES, Gpu, gpu_step
from costs.parts import Work

REPORTS = Path(__file__).resolve().parents[1] / "reports"
H100 = "nvidia-h100-80gb-hbm3/gpu_check.json"
EPYC = ("amd-epyc-2-threads/report.json", "amd-epyc-2-threads-rows/report.json")
COMMITS = {H100: "5e0ba55", EPYC[0]: "887f663", EPYC[1]: "99bc770"}
"""What the model was fitted to, and docs/tuning.md shows. Reports of other commits are predicted all the same."""
NAMED = {"bf16": ("bfloat16", None), "e4m3 cache": ("bfloat16", "float8_e4m3fn"), "int8 weights": ("int8", None)}
"""Weights and cache, by the names of `make gpu`'s steps."""
FITTED = {"decode[b-float32-1]", "decode[b-bfloat16-1]", "decode[b-int8-1]", "decode[b-float32-32]",
          "decode[b-bfloat16-32]", "decode[b-int8-32]", "decode_rows[rows2-columns16-int8-by-int8]",
          "decode_rows[rows64-columns1-int8-by-int8]"}  # fmt: skip
"""Points that the CPU's shares were fitted to. The GPU's numbers come from single operators, and from no step."""


@dataclass(frozen=True)
class Point:
    """Seconds of a step. Where the memory's speed changed between the rounds, so does the prediction: `least` is with
    the fastest memory, `most` with the slowest."""

    name: str
    measured: float
    least: float
    most: float
    fitted: bool = False

    @property
    def ratio(self) -> float:
        """Prediction over measurement, of the end of the range that is nearer; 1 within the range."""
        return min(max(self.measured, self.least), self.most) / self.measured


def ceilings_of(path: Path) -> dict[str, float]:
    """The measured ceilings of a report of either kind, and the seconds of a graph's node where it has them. Raises
    ValueError for another file."""
    data = json.loads(Path(path).read_text())
    if "alitok_fast" in data and data["alitok_fast"].get("ceilings"):
        return dict(data["alitok_fast"]["ceilings"])
    numbers = _numbers(data)
    names = ("fp32_flops", "bf16_flops", "int8_flops", "read_bytes")
    if not all(name in numbers for name in names):
        raise ValueError(f"ceilings: expected a report.json or gpu_check.json with measured ceilings, got {path}")
    found = {name: numbers[name] for name in names}
    node = numbers.get("a node of a graph")
    return found if node is None else {**found, "node": node * 1e-6}


def gpu_of(ceilings: dict[str, float]) -> Gpu:
    """An H100 with these ceilings instead of its own."""
    names = ("read_bytes", "bf16_flops", "fp32_flops", "node")
    return replace(Gpu(), **{name: ceilings[name] for name in names if name in ceilings})


def cpu_of(ceilings: dict[str, float], read_bytes: float | None = None) -> Cpu:
    names = ("fp32_flops", "bf16_flops", "int8_flops")
    return Cpu(read_bytes or ceilings["read_bytes"], *(ceilings[name] for name in names))


def commit_of(path: Path) -> str:
    """As far as COMMITS names it."""
    data = json.loads(path.read_text())
    return (data.get("commit") or data.get("commit_info", {}).get("id", ""))[:7]


def gpu_points(path: Path = REPORTS / H100) -> Iterator[Point]:
    """The steps of `make gpu`, as its commit ran them."""
    data, commit = json.loads(path.read_text()), commit_of(path)
    launches = commit if commit in LAUNCHES else "present"
    gpu, numbers = gpu_of(ceilings_of(path)), _numbers(data)
    for batch in (1, 8, 64, 256):
        for name, (weights, cache) in NAMED.items():
            measured = numbers.get(f"B x 24 layers, batch {batch}, {name}: a step")
            if measured is not None:
                step = gpu_step(Work(GENERATORS["b"], batch, weights, cache), gpu, LAUNCHES[launches])
                yield Point(f"batch {batch}, {name}", measured * 1e-3, step.seconds, step.seconds)


def cpu_points(path: Path) -> Iterator[Point]:
    """Passes half-way through an image (`bench_decode`, `bench_decode_rows`) and steps of whole images."""
    data = json.loads(path.read_text())
    ceilings = data["alitok_fast"]["ceilings"]
    for bench in data["benchmarks"]:
        info, found = bench["extra_info"], []
        if bench["name"].startswith("bench_decode"):
            work, seconds = _decoded(bench["params"]), info["contenders"]["alitok_fast"]["seconds"]["median"]
            found = [(bench["name"].removeprefix("bench_"), work, seconds)]
        elif info.get("kind") == "image":
            found = list(_sampled(bench["name"].removeprefix("bench_"), info))
        memory = info.get("read_bytes") or dict.fromkeys(("fastest", "slowest"), ceilings["read_bytes"])
        for name, work, seconds in found:
            ends = [cpu_step(work, cpu_of(ceilings, memory[end])).seconds for end in ("fastest", "slowest")]
            yield Point(name, seconds, min(ends), max(ends), name in FITTED)


def _decoded(params: dict[str, Any]) -> Work:
    config = GENERATORS[params.get("size", "b")]
    weights, _, activations = params["weights"].partition("-by-")
    batch, window = params.get("batch") or params["rows"] // 2, params.get("columns", 1)
    return Work(config, batch, weights, None, activations or None, window, config.num_tokens // 2)


def _sampled(name: str, info: dict[str, Any]) -> Iterator[tuple[str, Work, float]]:
    """The steps of our systems: the tokens' time less that of the draws."""
    formats = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
    config = GENERATORS[info["size"]]
    for system, result in info["contenders"].items():
        kind, _, rest = system.removeprefix("alitok_fast ").partition(", ")
        if not result["own"] or "draw" not in result or kind not in formats:
            continue
        work = Work(config, info["batch"], formats[kind], None, "int8" if rest else None)
        label = f"{name}, {kind}" + (f", {rest}" if rest else "")
        yield label, work, (result["parts"]["tokens"] - result["draw"]) / config.num_tokens


def _numbers(data: dict[str, Any]) -> dict[str, float]:
    items = [item for step in data.get("steps", []) for item in step["items"]]
    return {number["name"]: number["value"] for item in items for number in item.get("numbers", [])}


def markdown(points: list[Point]) -> str:
    """A table: a range where the memory's speed changed; the ratio is that of the nearer end."""
    lines = ["| step | predicted | measured | predicted / measured |", "|---|---|---|---|"]
    for point in points:
        low, high = f"{1e3 * point.least:.3g}", f"{1e3 * point.most:.3g}"
        span = low if low == high else f"{low} to {high}"
        mark = " (fitted)" if point.fitted else ""
        lines.append(f"| {point.name}{mark} | {span} | {1e3 * point.measured:.3g} | {point.ratio:.2f} |")
    return "\n".join(lines)
