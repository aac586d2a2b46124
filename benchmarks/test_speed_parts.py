"""The arithmetic of a report, without timing anything: floors, turns, names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alitok_fast.config import GENERATORS, TOKENIZERS
from alitok_fast.models import Generator
from ceilings import Ceilings, at_rest
from floor import Machine, decode_floor, step_weights, tokens_floor
from machine import GpuMonitor, slug, throttle_reasons
from report.readme import ONE_ROUND
from report.readme import table as readme_table
from session import COLD, result_line
from timing import Contender, Turns

ROOT = Path(__file__).resolve().parents[1]
H100 = Machine(flops=790e12, read_bytes=3.0e12)


@pytest.mark.parametrize(
    ("size", "milliseconds"),
    [
        ("b", (33.6, 6.03, 2.59, 2.34)),
        ("l", (59.6, 9.82, 3.60, 3.15)),
        ("xl", (124, 19.3, 6.22, 5.27)),
    ],
)
def test_floor_of_an_image_in_bf16(size, milliseconds):
    """Worked out by hand for 3.0 TB/s and 790 TFLOP/s at batch 1, 8, 64 and 256."""
    config, tokenizer = GENERATORS[size], TOKENIZERS["256"]
    for batch, expected in zip((1, 8, 64, 256), milliseconds, strict=True):
        tokens = tokens_floor(config, batch, 2 * step_weights(config), 2, H100)
        assert 1e3 * (tokens + decode_floor(tokenizer, batch, 2, H100)) / batch == pytest.approx(expected, rel=0.01)


def test_step_weights_are_the_generators_matrices():

    with torch.device("meta"):
        gen = Generator(GENERATORS["b"])
    matrices = sum(p.numel() for p in gen.parameters() if p.ndim == 2) - gen.embeddings.weight.numel()
    assert step_weights(gen.config) == matrices


class Clock:
    """Time passes only while a contender runs."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, log: list[str], name: str):
        def run():
            log.append(name)
            self.now += seconds

        return run


def play(times: dict[str, float], budget: float, most: int) -> tuple[Turns, list[str]]:
    clock, log = Clock(), []
    turns = Turns({n: Contender(clock.taking(s, log, n)) for n, s in times.items()}, budget, most, clock=clock)
    log.clear()
    for _ in range(turns.rounds):
        turns.others_take()
        turns.take(turns.first)
    return turns, log


def test_turns_alternate_and_slow_contenders_have_fewer():
    turns, log = play({"own": 1.0, "fast": 0.5, "slow": 4.0, "endless": 100.0}, budget=9.0, most=5)
    assert log[:8] == ["fast", "slow", "endless", "own", "fast", "slow", "own", "fast"]
    rounds = {name: result["seconds"]["rounds"] for name, result in turns.summary().items()}
    assert rounds == {"own": 5, "fast": 5, "slow": 2, "endless": 1}
    assert turns.summary()["slow"]["times"] == 4.0


def test_one_round_of_what_is_over_the_budget():
    turns, log = play({"own": 50.0, "other": 1.0}, budget=9.0, most=5)
    assert log == ["other", "own"]
    assert turns.summary()["own"]["seconds"] == {"median": 50.0, "fastest": 50.0, "slowest": 50.0, "rounds": 1}


def test_parts_are_medians_of_the_rounds():
    parts = iter([{"tokens": 9.0}, {"tokens": 9.0}, {"tokens": 1.0}, {"tokens": 2.0}, {"tokens": 6.0}])
    clock = Clock()

    def run():
        clock.now += 1.0
        return next(parts)

    turns = Turns({"own": Contender(run, facts={"own": True})}, budget=3.0, most=3, clock=clock)
    for _ in range(turns.rounds):
        turns.take("own")
    assert turns.summary()["own"]["parts"] == {"tokens": 2.0}
    assert turns.summary()["own"]["own"] is True


def test_what_comes_before_a_round_is_not_timed():
    clock, log = Clock(), []
    before = clock.taking(5.0, log, "before")
    contenders = {"own": Contender(clock.taking(1.0, log, "own")), "cold": Contender(lambda: None, before=before)}
    turns = Turns(contenders, budget=3.0, most=2, clock=clock)
    log.clear()
    turns.others_take()
    assert log == ["before"] and turns.seconds["cold"] == [0.0]


class Neighbours:
    """Stands for the monitor of other processes, which have had so many cores."""

    def __init__(self, cores: float) -> None:
        self.cores = cores

    def __enter__(self) -> Neighbours:
        return self

    def __exit__(self, *_) -> None:
        pass


def test_ceilings_are_measured_until_the_machine_rests():
    def run(cores: list[float]) -> Ceilings:
        values = iter([Ceilings(9, 1, 1, 1), Ceilings(5, 5, 5, 5), Ceilings(7, 7, 7, 7)])
        busy = iter(cores)
        return at_rest(lambda: next(values), tries=2, others=lambda: Neighbours(next(busy)))

    assert run([0.0]) == Ceilings(9, 1, 1, 1), "undisturbed at once"
    assert run([1.5, 0.0]) == Ceilings(9, 5, 5, 5), "the higher of each"
    assert run([1.5, 1.5]) == Ceilings(9, 5, 5, 5), "no third try"


def test_names_of_machines():
    assert slug({"device": "cpu", "name": "AMD EPYC", "threads": 2}) == "amd-epyc-2-threads"
    assert slug({"device": "cuda", "name": "NVIDIA H100 80GB HBM3", "threads": 8}) == "nvidia-h100-80gb-hbm3"
    name = "Intel(R) Xeon(R) Gold 6430"
    assert slug({"device": "cpu", "name": name, "threads": 32}) == "intel-xeon-gold-6430-32-threads"


def test_throttling_in_words():
    assert throttle_reasons(0x1) == []
    assert throttle_reasons(0x44) == ["power cap", "hardware thermal"]


class Nvml:
    """Stands for pynvml; `refused` names the functions that raise."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, *refused: str) -> None:
        self.refused, self.calls = refused, []

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if name in self.refused:
                raise self.NVMLError("Not Supported" if "Device" in name else "Insufficient Permissions")
            if name == "nvmlDeviceGetHandleByUUID":
                return "handle"
            return {"nvmlDeviceGetClockInfo": 1000, "nvmlDeviceGetPowerUsage": 250_000}.get(name, 4)

        return call


@pytest.fixture
def watched(monkeypatch):
    """watched(nvml) -> the summary of a monitor that has watched a GPU through it."""

    def run(nvml) -> dict:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-56"))
        with GpuMonitor(torch.device("cuda", 0)) as monitor:
            pass
        assert json.loads(json.dumps(monitor.summary)) == monitor.summary
        return monitor.summary

    return run


def test_a_gpu_is_watched(watched):
    nvml = Nvml()
    summary = watched(nvml)
    assert summary["watts"] == {"before": 250, "median": 250, "least": 250, "most": 250}
    assert summary["samples"] == 2 and summary["throttling"] == ["power cap"] and summary["unread"] == {}
    assert nvml.calls[1] == ("nvmlDeviceGetHandleByUUID", "GPU-1234-56") and nvml.calls[-1] == ("nvmlShutdown",)
    with GpuMonitor(torch.device("cpu")) as monitor:
        assert monitor.summary is None


def test_what_nvml_does_not_give_is_left_out(watched):
    summary = watched(Nvml("nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlShutdown"))
    assert summary["unread"] == {"watts": "NVML: Not Supported", "throttling": "NVML: Not Supported"}
    assert "watts" not in summary and summary["throttling"] is None and summary["sm_mhz"]["median"] == 1000


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (None, "nvidia-ml-py is not installed: pip install nvidia-ml-py"),  # as importing it raises ImportError
        (Nvml("nvmlInit"), "NVML: Insufficient Permissions"),
        (Nvml("nvmlDeviceGetHandleByUUID"), "NVML: Not Supported"),
    ],
)
def test_timing_goes_on_without_nvml(watched, nvml, reason):
    assert watched(nvml) == {"samples": 0, "throttling": None, "unread": {"everything": reason}}
    tried = [call[1] for call in getattr(nvml, "calls", []) if call[0] == "nvmlDeviceGetHandleByUUID"]
    assert tried in ([], ["GPU-1234-56", "MIG-1234-56"])


def timed(seconds: float, times: float = 1.0, rounds: int = 3, **facts) -> dict:
    return {
        "seconds": {"median": seconds, "fastest": seconds, "slowest": seconds, "rounds": rounds},
        "times": times,
        **facts,
    }


@pytest.fixture
def results() -> dict:
    """An image of B takes 2 s and a peer 12 s, one operator is 4 times as fast as the best alternative, one half."""
    image = {"alitok_fast int8": timed(2.0, own=True, rounds=1), "eager": timed(12.0, 6.0, own=False)}
    operators = [
        {"alitok_fast": timed(1.0), COLD: timed(1.1, 1.1), "formula": timed(9.0, 9.0), "addmm": timed(4.0, 4.0)},
        {"alitok_fast": timed(1.0), COLD: timed(1.1, 1.1), "SDPA": timed(0.5, 0.5)},
    ]
    info = {"kind": "operator", "others": 0.0}
    return {
        "bench_sampling[b-1]": {
            "kind": "image",
            "others": 0.0,
            "size": "b",
            "batch": 1,
            "layers": 4,
            "contenders": image,
        },
        "bench_forward[256]": {**info, "contenders": operators[0]},
        "bench_plain": {**info, "contenders": operators[1]},
    }


def test_a_run_ends_with_its_result(results):
    assert result_line(results, {}, 125.0) == (
        "result: ok; 3 benchmarks in 2 min 5 s; B of 4 layers, 1 at a time: 2 s an image with alitok_fast int8 "
        "(1 round), 6x eager; the fastest alternative to an operator takes 2.25x as long "
        "(0.5x plain to 4x forward[256])"
    )


def test_the_result_says_what_spoils_it(results):
    results["bench_plain"]["others"] = 1.5
    line = result_line(results, {"bench_plain": "AssertionError"}, 10.0)
    assert line.startswith("result: 1 FAILED; ") and line.endswith("busy during 1 of 3, so times are too long")


def test_a_quick_run_has_cases_of_every_operator():
    """But for diffusion, whose step takes longer than all of them, and for serving, which takes twenty seconds."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark", "--quick", "--collect-only", "-q"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cases = [line.split("::") for line in out.splitlines() if "::" in line]
    functions = {
        (file.name, line.split("(")[0].removeprefix("def "))
        for file in ROOT.glob("benchmarks/bench_*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def bench_")
    }
    found = {(Path(file).name, name.split("[")[0]) for file, name in cases}
    left_out = {("bench_diffusion.py", "bench_diffusion"), ("bench_serving.py", "bench_serving")}
    assert functions - found == left_out and found <= functions
    assert len(cases) <= 30


def test_times_of_one_round_are_marked_in_the_readme():
    report = json.loads((ROOT / "benchmarks/reports/amd-epyc-2-threads/report.json").read_text())
    bench = next(one for one in report["benchmarks"] if one["name"] == "bench_sampling[b-1]")
    rounds = {name: one["seconds"]["rounds"] for name, one in bench["extra_info"]["contenders"].items()}
    assert rounds["alitok_fast int8"] > 1 and rounds["reference, fp32"] == 1  # what this test is about
    row = next(line for line in readme_table(ROOT / "benchmarks/reports", ROOT).splitlines() if "| B | 1 |" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert ONE_ROUND not in cells[4] and cells[6].endswith("x" + ONE_ROUND)
