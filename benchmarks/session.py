"""What one run of the benchmarks adds up to, beyond pytest-benchmark's own records, and writing its report."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from load import BOUNDS, held
from machine import BUSY

COLD = "alitok_fast, cold caches"


@dataclass(eq=False)  # pytest keeps it in a set of plugins
class Session:
    full: bool
    machine: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] | None = None
    command: str = ""
    folder: Path | None = None
    partial: bool = False
    lines: list[str] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    scratch: TemporaryDirectory | None = None
    written: Path | None = None
    begin: float = field(default_factory=time.monotonic)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.waiting = {_name(item.nodeid) for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps what failed, and the reasons of what was skipped."""
        name = _name(report.nodeid)
        if report.when == "teardown":
            self.waiting.discard(name)
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[name] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            self.failed[name] = str(report.longrepr).strip().splitlines()[-1]

    def to_dict(self) -> dict[str, Any]:
        """What a report's JSON holds under "alitok_fast"."""
        return {
            "full": self.full,
            "partial": self.partial,
            "command": self.command,
            "seconds": round(time.monotonic() - self.begin),
            "machine": self.machine,
            "ceilings": self.ceilings,
            "skipped": {**self.skipped, **dict.fromkeys(sorted(self.waiting), "the run was stopped before its end")},
            "failed": self.failed,
        }

    def write(self, measured: Path | None, asked_for: bool) -> None:
        """The report from pytest-benchmark's JSON, if there is one to write: of all benchmarks, or where asked for."""
        if self.folder is not None and measured is not None and _filled(measured) and (asked_for or not self.partial):
            from report.pages import write_report

            self.written = write_report(json.loads(measured.read_text()), self.folder)
        if self.scratch is not None:
            self.scratch.cleanup()


def _filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _name(nodeid: str) -> str:
    return nodeid.rpartition("/")[2]


def full_report(config: pytest.Config, benchmarks: Path) -> bool:
    """Whether the command line names all benchmarks, and not some of them."""
    chosen = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    return benchmarks.resolve() in chosen


def terminal_lines(name: str, info: dict[str, Any]) -> list[str]:
    """One benchmark's result in words."""
    if info.get("kind") == "serving":
        return _served(name, info)
    (first, own), *others = info["contenders"].items()
    line = f"{name}: {first} {_seconds(own['seconds'])}"
    share = 1.0
    if info.get("ceiling"):
        unit = "GB/s" if info["unit"].endswith("bytes") else "GFLOP/s"
        rate = info["work"] / own["seconds"]["median"]
        share = rate / info["ceiling"]
        line += f", {rate / 1e9:.0f} {unit}, {share:.0%} of the measured {info['ceiling'] / 1e9:.0f}"
    lines = [line + _predicted(own, "steps " if info.get("kind") == "image" else "")]
    if (info["others"] or 0) > BUSY:
        lines.append(f"    the machine was busy: other processes had {info['others']:.1f} cores")
    lines += [f"    {other['times']:6.2f}x  {label} ({_seconds(other['seconds'])})" for label, other in others]
    lines += [f"    missing  {label}: {reason}" for label, reason in info["missing"].items()]
    return lines


def _served(name: str, info: dict[str, Any]) -> list[str]:
    """What a request alone takes, and what each system holds within bounds of p95."""
    (first, own), (second, engine) = info["contenders"].items()
    alone = f"{name}: a request alone {1e3 * own['seconds']['median'] / info['images']:.4g} ms with {first}, "
    lines = [alone + f"{engine['times']:.3g}x with {second}; images/s with p95 within {BOUNDS[-1]:g}x that:"]
    for system, rows in info["loads"].items():
        rates = {bound: held(rows, bound * info["solo"]) for bound in BOUNDS}
        words = {bound: "none" if rate is None else f"{rate:.3g}" for bound, rate in rates.items()}
        lines[0] += f" {system} {words[BOUNDS[-1]]},"
        within = ", ".join(f"{bound:g}x {word}" for bound, word in words.items())
        lines.append(f"    {system}: {within}; up to load {rows[-1]['load']:g}x, {info['stopped'][system]}")
    lines[0] = lines[0].removesuffix(",")
    return lines


def _predicted(own: dict[str, Any], what: str) -> str:
    """What the model of benchmarks/cost.py gives it, with the slowest and the fastest memory between the rounds."""
    if "predicted" not in own:
        return ""
    least, most = (f"{own['predicted'][end] * 1e3:.4g}" for end in ("least", "most"))
    return f", {what}predicted {least} ms" if least == most else f", {what}predicted {least} to {most} ms"


def result_line(results: dict[str, dict[str, Any]], failed: dict[str, str], seconds: float) -> str:
    """A run in one line: what failed, an image beside its peers, operators beside the fastest alternatives."""
    parts = [f"{len(failed)} FAILED" if failed else "ok"]
    parts.append(f"{len(results)} benchmarks in {seconds // 60:.0f} min {seconds % 60:.0f} s")
    images = [info for info in results.values() if info.get("kind") == "image"]
    if images:
        parts.append(_image(min(images, key=lambda info: info["batch"])))
    times = {}
    for name, info in results.items():
        others = [other["times"] for label, other in list(info["contenders"].items())[1:] if label != COLD]
        if info.get("kind") == "operator" and others:
            times[name.removeprefix("bench_")] = min(others)
    if times:
        least, most = min(times, key=times.get), max(times, key=times.get)
        parts.append(
            f"the fastest alternative to an operator takes {statistics.median(times.values()):.3g}x as long "
            f"({times[least]:.3g}x {least} to {times[most]:.3g}x {most})"
        )
    busy = sum((info["others"] or 0) > BUSY for info in results.values())
    if busy:
        parts.append(f"the machine was busy during {busy} of {len(results)}, so times are too long")
    return "result: " + "; ".join(parts)


def _image(info: dict[str, Any]) -> str:
    own = {name: one for name, one in info["contenders"].items() if one["own"]}
    name = min(own, key=lambda name: own[name]["seconds"]["median"])
    median, rounds = own[name]["seconds"]["median"], own[name]["seconds"]["rounds"]
    text = f"{info['size'].upper()} of {info['layers']} layers, {info['batch']} at a time: "
    text += f"{median / info['batch']:.3g} s an image with {name}" + (" (1 round)" if rounds == 1 else "")
    peers = {label: one["seconds"]["median"] for label, one in info["contenders"].items() if not one["own"]}
    return text + "".join(f", {seconds / median:.3g}x {label}" for label, seconds in peers.items())


def _seconds(spread: dict[str, float]) -> str:
    median, fastest, slowest = (f"{spread[key] * 1e3:.4g}" for key in ("median", "fastest", "slowest"))
    return f"median {median} ms ({fastest} to {slowest}), rounds: {spread['rounds']}"
