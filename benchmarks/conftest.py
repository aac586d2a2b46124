"""`pytest benchmarks/` runs every benchmark once, as a correctness check; with `--benchmark` it times them.

    pytest benchmarks/ --benchmark                 everything, at full size
    pytest benchmarks/ --benchmark --quick         smaller and fewer, for CI
    pytest benchmarks/bench_vq_lookup.py --benchmark --benchmark-json=vq.json

A benchmark checks its outputs, then hands its function and the alternatives to `compare`. These take turns, round
after round, so that a change of clock or a busy neighbour meets all of them; the speed-up is the median of the rounds'
ratios. pytest-benchmark keeps the function's times, and its `extra_info` everything else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from ceilings import Ceilings, measure_ceilings, synchronize

ROUNDS, QUICK_ROUNDS = 9, 3
RESULTS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("alitok_fast benchmarks")
    group.addoption("--benchmark", action="store_true", help="time the benchmarks instead of only checking them")
    group.addoption("--quick", action="store_true", help="with --benchmark: smaller sizes, fewer rounds")
    group.addoption("--device", default="cpu", type=torch.device, help="cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable = not config.option.benchmark  # pytest-benchmark then calls each function once
    config.stash[RESULTS] = []


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.stash[RESULTS]:
        terminalreporter.section("alitok_fast")
        terminalreporter.write_line("\n".join(config.stash[RESULTS]))


@dataclass(frozen=True)
class Mode:
    """How much to do. Sizes: `mode.pick(check=..., quick=..., full=...)`."""

    timed: bool
    quick: bool

    def pick(self, *, check, quick, full):
        return check if not self.timed else quick if self.quick else full


@pytest.fixture(scope="session")
def mode(request: pytest.FixtureRequest) -> Mode:
    return Mode(request.config.option.benchmark, request.config.option.quick)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.config.option.device


@pytest.fixture(scope="session")
def ceilings(mode: Mode, device: torch.device) -> Ceilings | None:
    """Measured once a session; None when nothing is timed."""
    return measure_ceilings(device) if mode.timed else None


@pytest.fixture
def compare(benchmark, mode: Mode, device: torch.device, ceilings: Ceilings | None, request) -> Callable[..., None]:
    """compare(function, alternatives, work, ceiling): time `function` beside its alternatives.

    `alternatives` maps a name to a function of no arguments; `work` is what one call does, in the unit of `ceiling`, a
    field of Ceilings ("fp32_flops", "bf16_flops", "read_bytes").
    """

    def run(function: Callable, alternatives: Mapping[str, Callable], work: float, ceiling: str) -> None:
        def timed(f: Callable) -> float:
            synchronize(device)
            begin = time.perf_counter()
            f()
            synchronize(device)
            return time.perf_counter() - begin

        for f in (function, *alternatives.values()):
            f()  # warm: caches, autotuning, compilation
        times: dict[str, list[float]] = {name: [] for name in alternatives}
        own: list[float] = []
        cores: list[float] = []  # that the function really had: on a busy machine fewer than it has threads

        def own_turn() -> None:
            begin = time.process_time()
            own.append(timed(function))
            cores.append((time.process_time() - begin) / own[-1])

        def alternatives_take_their_turn() -> None:
            for name, alternative in alternatives.items():
                times[name].append(timed(alternative))

        rounds = mode.pick(check=1, quick=QUICK_ROUNDS, full=ROUNDS)
        benchmark.pedantic(own_turn, setup=alternatives_take_their_turn, rounds=rounds)
        if not mode.timed:
            return
        own = own[-rounds:]
        info = _summary(own, times, work, ceiling, getattr(ceilings, ceiling))
        info["ceilings"] = ceilings.to_dict()
        info["machine"] = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
        info["cores"] = statistics.median(cores)
        benchmark.extra_info.update(info)
        request.config.stash[RESULTS].append(_line(request.node.name, info))

    return run


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


def _summary(own: list[float], times: dict[str, list[float]], work: float, unit: str, ceiling: float) -> dict:
    seconds = _spread(own)
    rate = work / seconds["median"]
    return {
        "seconds": seconds,
        "work": work,
        "rate": {"unit": unit, "median": rate, "share_of_ceiling": rate / ceiling, "best": work / seconds["fastest"]},
        "alternatives": {
            name: {
                "seconds": _spread(other),
                "speedup": statistics.median(b / a for a, b in zip(own, other, strict=True)),
            }
            for name, other in times.items()
        },
    }


def _line(name: str, info: dict) -> str:
    seconds, rate = info["seconds"], info["rate"]
    unit = "GB/s" if rate["unit"].endswith("bytes") else "GFLOP/s"
    lines = [
        f"{name}: median {seconds['median'] * 1e3:.2f} ms ({seconds['fastest'] * 1e3:.2f} to "
        f"{seconds['slowest'] * 1e3:.2f}), {rate['median'] / 1e9:.0f} {unit}, "
        f"{rate['share_of_ceiling']:.0%} of the measured {info['ceilings'][rate['unit']] / 1e9:.0f}"
    ]
    threads = info["machine"]["threads"]
    if info["machine"]["device"] == "cpu" and info["cores"] < 0.8 * threads:
        while_running = rate["share_of_ceiling"] * threads / info["cores"]
        lines.append(
            f"    the machine was busy: {info['cores']:.2f} of {threads} cores; {while_running:.0%} while running"
        )
    for other, result in info["alternatives"].items():
        lines.append(f"    {result['speedup']:6.2f}x  {other} (median {result['seconds']['median'] * 1e3:.2f} ms)")
    return "\n".join(lines)
