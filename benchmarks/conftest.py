"""`pytest benchmarks/` runs every benchmark once, as a correctness check; with `--benchmark` it times them.

    pytest benchmarks/ --benchmark                 everything, at full size; writes benchmarks/reports/<machine>/
    pytest benchmarks/ --benchmark --quick         smaller and fewer: two minutes; writes .../<machine>-quick/
    pytest benchmarks/ --benchmark --reference-repo PATH       beside the reference implementation
    pytest benchmarks/bench_vq_lookup.py --benchmark --report-dir /tmp/vq      a part of it, written where told

A benchmark checks its outputs, then hands its function and the alternatives to `compare`. These take turns, round after
round (`timing.py`). pytest-benchmark keeps the function's times, and its `extra_info` everything else.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from alitok_fast._library import install_hint
from alitok_fast.config import TOKENIZERS, generator_preset
from alitok_fast.models import Generator, Tokenizer
from ceilings import Ceilings, at_rest, measure_ceilings, read_bytes, synchronize
from machine import GpuMonitor, OthersMonitor, describe, slug
from random_models import random_generator, random_tokenizer
from session import COLD, Session, full_report, result_line, terminal_lines
from timing import Contender, Missing, Turns

MOST_ROUNDS, MOST_QUICK_ROUNDS = 9, 3
BUDGET, QUICK_BUDGET = 1.0, 0.2  # seconds of one contender
COLD_BYTES = 2**28  # several times the last-level cache of today's machines
PATHS = tuple(map(int, version("pytest-benchmark").split(".")[:2])) >= (5, 3)  # before, its JSON was an open file
SESSION = pytest.StashKey[Session]()
HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("alitok_fast benchmarks")
    group.addoption("--benchmark", action="store_true", help="time the benchmarks instead of only checking them")
    group.addoption("--quick", action="store_true", help="with --benchmark: smaller sizes, fewer rounds")
    group.addoption("--device", default="cpu", type=torch.device, help="cpu (default) or cuda")
    group.addoption("--reference-repo", type=Path, help="checkout of the reference implementation, to time beside ours")
    group.addoption("--report-dir", type=Path, help="folder for the report; needed for a part of the benchmarks")
    group.addoption("--machine", help="name of the report's folder; by default from the device's name")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    option.benchmark_disable = not option.benchmark  # pytest-benchmark then calls each function once
    session = config.stash[SESSION] = Session(full=not option.quick)
    config.pluginmanager.register(session)
    config.addinivalue_line("markers", "quick(*ids): cases that a quick run of everything has; all if none is named")
    option.benchmark_quiet = option.quick  # a line for each, and one for all
    if not option.benchmark:
        return
    session.machine, session.partial = describe(option.device), not full_report(config, HERE)
    session.command = "pytest benchmarks/ --benchmark" + (" --quick" if option.quick else "")
    session.command += " --reference-repo PATH" if option.reference_repo else ""
    session.command += f" --device {option.device}" if option.device.type != "cpu" else ""
    suffix = "" if session.full else "-quick"
    session.folder = option.report_dir
    if session.folder is None and full_report(config, HERE):
        session.folder = HERE / "reports" / ((option.machine or slug(session.machine)) + suffix)
    if session.folder is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise pytest.UsageError(f"the report's plots need matplotlib: {install_hint('bench')}") from None
        if option.benchmark_json is None:
            session.scratch = tempfile.TemporaryDirectory()
            report = Path(session.scratch.name) / "report.json"
            option.benchmark_json = report if PATHS else report.open("wb")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A quick run of everything has the cases marked `quick`. A part that is named is run as named."""
    option = config.option
    if option.benchmark and option.quick and full_report(config, HERE) and not option.keyword:
        items[:] = [item for item in items if is_quick(item)]  # not called deselected: it is all of a quick run


def is_quick(item: pytest.Item) -> bool:
    marker, case = item.get_closest_marker("quick"), getattr(item, "callspec", None)
    return marker is not None and (not marker.args or (case is not None and case.id in marker.args))


def pytest_deselected(items) -> None:
    if items:
        items[0].config.stash[SESSION].partial = True


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info.pop("node", None)  # the host's name is nobody's business


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json["alitok_fast"] = config.stash[SESSION].to_dict()


@pytest.hookimpl(trylast=True)  # pytest-benchmark has written its JSON by then
def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        measured = config.option.benchmark_json
        path = None if measured is None else Path(measured if PATHS else measured.name)
        session.write(path, asked_for=config.option.report_dir is not None)
    if session.lines:
        terminalreporter.section("alitok_fast")
        terminalreporter.write_line("\n".join(session.lines))
    if session.written:
        terminalreporter.write_line(f"report: {session.written}")
    if session.results:
        terminalreporter.write_line(result_line(session.results, session.failed, time.monotonic() - session.begin))


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
def reference_repo(request: pytest.FixtureRequest) -> Path | None:
    return request.config.option.reference_repo


@pytest.fixture(scope="session")
def ceilings(mode: Mode, device: torch.device, request: pytest.FixtureRequest) -> Ceilings | None:
    """Measured once a session, again while other processes disturb it; None when nothing is timed."""
    if not mode.timed:
        return None
    measured = at_rest(lambda: measure_ceilings(device), tries=mode.pick(check=1, quick=1, full=8))
    request.config.stash[SESSION].ceilings = measured.to_dict()
    return measured


@pytest.fixture(scope="session")
def generator(mode: Mode, device: torch.device) -> Callable[[str], Generator]:
    """make(preset) -> a generator with random weights, cut short unless timed at full size."""

    @functools.cache
    def make(preset: str) -> Generator:
        config = generator_preset(preset)
        layers = mode.pick(check=2, quick=4, full=config.num_layers)
        grid = mode.pick(check=4, quick=config.grid, full=config.grid)
        return random_generator(preset, device, num_layers=layers, grid=grid)

    return make


@pytest.fixture(scope="session")
def tokenizer(mode: Mode, device: torch.device) -> Tokenizer:
    """Stage 2, with random weights, cut short as the generators are."""
    config = TOKENIZERS["256"]
    small = {"encoder_layers": 1, "decoder_layers": mode.pick(check=2, quick=4, full=config.decoder_layers)}
    if mode.timed and not mode.quick:
        small = {}  # the reference takes the whole state
    size = mode.pick(check=4, quick=config.grid, full=config.grid) * config.patch_size
    return random_tokenizer(device, image_size=size, **small)


@pytest.fixture
def measure(benchmark, mode: Mode, device: torch.device, request) -> Callable[..., dict | None]:
    """measure(contenders, budget=None, **facts): time contenders in turns, the first of them for pytest-benchmark.

    `contenders` maps names to a Contender or to Missing. Each but the first has `budget` seconds for its rounds, and at
    least one round. `facts` go into the report. Returns what the report gets, None where nothing is timed.
    Where shares are of the memory's bandwidth, this is measured before each round (a quick run: the first one), and the
    highest counts.
    """

    def run(contenders: Mapping[str, Contender | Missing], budget: float | None = None, **facts) -> dict | None:
        present = {name: one for name, one in contenders.items() if isinstance(one, Contender)}
        most = mode.pick(check=1, quick=MOST_QUICK_ROUNDS, full=MOST_ROUNDS)
        if budget is None:
            budget = mode.pick(check=0.0, quick=QUICK_BUDGET, full=BUDGET)
        turns = Turns(present, budget, most, lambda: synchronize(device))
        of_memory = mode.timed and (
            facts.get("unit") == "read_bytes" or any(one.floor or one.predicted for one in present.values())
        )
        bandwidth = []

        def before_each_round() -> None:
            if of_memory and not (mode.quick and bandwidth):  # a third of a second each time
                bandwidth.append(read_bytes(device))  # not right before the first: it empties the caches
            turns.others_take()

        with GpuMonitor(device if mode.timed else torch.device("cpu")) as gpu, OthersMonitor() as others:
            benchmark.pedantic(turns.take, args=(turns.first,), setup=before_each_round, rounds=turns.rounds)
        if not mode.timed:
            return None
        summary = turns.summary()
        if of_memory:
            facts["read_bytes"] = {"fastest": max(bandwidth), "slowest": min(bandwidth)}
            for name, one in present.items():
                if one.floor is not None:
                    summary[name]["floor"] = dict(one.floor(max(bandwidth)))
                if one.predicted is not None:
                    summary[name]["predicted"] = dict(least=one.predicted(max(bandwidth)),
                                                      most=one.predicted(min(bandwidth)))  # fmt: skip
        if facts.get("unit") == "read_bytes":
            facts["ceiling"] = max(bandwidth)
        info = {
            **facts,
            "contenders": summary,
            "missing": {name: one.reason for name, one in contenders.items() if isinstance(one, Missing)},
            "others": others.cores,
            "gpu": gpu.summary,
        }
        benchmark.extra_info.update(info)
        session = request.config.stash[SESSION]
        session.results[request.node.name] = info
        lines = terminal_lines(request.node.name, info)
        session.lines += lines[:1] if mode.quick else lines
        return info

    return run


@pytest.fixture(scope="session")
def cold_caches(device: torch.device) -> Callable[[], object]:
    """A function that fills the caches with other memory."""
    memory = torch.zeros(COLD_BYTES, dtype=torch.uint8, device=device)
    return lambda: memory.add_(1)


@pytest.fixture
def compare(measure, ceilings: Ceilings | None, mode: Mode, cold_caches) -> Callable[..., None]:
    """compare(function, alternatives, work, ceiling): time `function` beside itself with cold caches and alternatives.

    `alternatives` maps a name to a function of no arguments or to Missing; `work` is what one call does, in the unit of
    `ceiling`, a field of Ceilings ("fp32_flops", "bf16_flops", "read_bytes"). `predicted` says how many seconds a model
    gives it where memory is read at so many bytes a second.
    """

    def run(
        function: Callable,
        alternatives: Mapping[str, Callable | Missing],
        work: float,
        ceiling: str,
        predicted: Callable[[float], float] | None = None,
    ) -> None:
        own = Contender(function, predicted=predicted)
        contenders = {"alitok_fast": own, COLD: Contender(function, before=cold_caches)}
        contenders |= {n: f if isinstance(f, Missing) else Contender(f) for n, f in alternatives.items()}
        most = getattr(ceilings, ceiling) if mode.timed else None
        measure(contenders, kind="operator", work=work, unit=ceiling, ceiling=most)

    return run
