"""Requests that come one by one: the engine beside one at a time and static batches, under rising offered loads.

Loads are multiples of what one image at a time can do. They rise for a system until p95 passes `SLOWEST` times the
time of an image alone, or the system does not keep up. What is compared and how is in the report's section "Serving".
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.thread_team import release_threads
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.serving import QueueFullError
from load import ANSWERED, FAILED, UNANSWERED, Load, arrivals, drive, why_stop
from machine import OthersMonitor
from peers.serving import ENGINE, ONE, SYSTEMS, Answer, Continuous, Request, Same, make
from random_models import random_generator, random_tokenizer
from timing import Contender

SEED = 7
SLOWEST = 20.0  # times the time of an image alone
OUTSTANDING = 32  # requests that may wait for their answers, of every system
ALONE = "pipe()"


@dataclass(frozen=True)
class Plan:
    """How much is asked of a model's systems.

    `loads` are of the engine and the static batches, `one` of one at a time, as multiples of its throughput. Requests
    arrive for `seconds` at each, but between `least` and `most` of them. The outputs of `agree` requests are compared
    first. `solo` images, one after the other, say what the multiples are of. Each system has `warm` requests before its
    loads, at a multiple of 1, of which nothing is kept: how many tokens a pass tries is learned for each number of
    images. At the end a request alone takes turns through `pipe()` and the engine for `budget` seconds of each,
    `images` in a turn.
    """

    loads: tuple[float, ...]
    one: tuple[float, ...]
    seconds: float
    least: int
    most: int
    agree: int
    solo: int
    warm: int
    budget: float
    images: int

    def requests(self, rate: float) -> int:
        return min(max(self.least, round(rate * self.seconds)), self.most)


DEMO = Plan(
    loads=(0.3, 0.5, 0.7, 1.0, 1.2, 1.4, 1.7, 2.0, 2.4, 2.8, 3.4, 4.0), one=(0.3, 0.5, 0.7, 0.85, 0.95),
    seconds=4.0, least=60, most=300, agree=11, solo=50, warm=100, budget=4.0, images=10,
)  # fmt: skip
B = Plan(
    loads=(0.8, 1.4, 1.8), one=(0.5, 0.8),
    seconds=40.0, least=16, most=40, agree=3, solo=3, warm=0, budget=10.0, images=1,
)  # fmt: skip
QUICK = Plan(
    loads=(0.5, 1.0, 2.0), one=(0.5, 0.85),
    seconds=1.5, least=20, most=60, agree=11, solo=20, warm=40, budget=1.0, images=5,
)  # fmt: skip
CHECK = Plan(loads=(2.0,), one=(2.0,), seconds=0.0, least=9, most=9, agree=11, solo=1, warm=0, budget=0.0, images=1)
EIGHT_BITS = {"weight_dtype": torch.int8, "activation_dtype": torch.int8, "decode_dtype": torch.int8}
PRECISIONS: dict[str, dict] = {"fp32": {}, "bf16": {"weight_dtype": torch.bfloat16}, "int8": EIGHT_BITS}


def pytest_generate_tests(metafunc):
    option = metafunc.config.option
    plans = {("demo", name): DEMO for name in PRECISIONS} | {("b", "int8"): B}
    if not option.benchmark or option.quick:
        plans = {("demo", "fp32"): QUICK if option.benchmark else CHECK}
    cases = [pytest.param(*case, plan, id="-".join(case)) for case, plan in plans.items()]
    metafunc.parametrize(("model", "precision", "plan"), cases)


def bench_serving(model, precision, plan, measure, mode, device):
    if device.type != "cpu":
        pytest.skip("its models and precisions are those of a CPU")
    pipe = pipeline(model, PRECISIONS[precision], device)
    asked = Asked(pipe.generator.config.num_classes)
    same, first = Same(), asked.next(plan.agree)
    agree(pipe, first, same)
    solo = statistics.median(seconds_alone(pipe, one) for one in asked.next(plan.solo))
    warm = asked.next(plan.warm)
    steps = {load: asked.next(plan.most) for load in sorted({*plan.loads, *plan.one})}
    loads, stopped = {}, {}
    for name in SYSTEMS:  # one after the other: torch's threads of one slow down those of another (`release_threads`)
        release_threads()
        with contextlib.closing(make(name, pipe, SEED)) as system:
            for request, future in [(request, system.submit(request)) for request in first]:
                same.check(request, future.result(), name)
            offer(name, system, warm, 1.0 / solo, same)
            asks = {load: steps[load] for load in (plan.one if name == ONE else plan.loads)}
            loads[name], stopped[name] = rising(name, system, asks, plan, solo, same)
    with contextlib.closing(Continuous(pipe, SEED)) as engine:
        turns = {
            ALONE: Contender(lambda: alone(pipe, asked.next(plan.images))),
            ENGINE: Contender(lambda: through(engine, asked.next(plan.images))),
        }
        facts = {"model": model, "precision": in_words(pipe), "layers": pipe.generator.config.num_layers, "solo": solo}
        limits = {"outstanding": OUTSTANDING, "slowest": SLOWEST, "images": plan.images, "same": same.summary()}
        budget = plan.budget if mode.timed else 0.0
        measure(turns, budget, kind="serving", loads=loads, stopped=stopped, **facts, **limits)


def pipeline(model: str, precision: dict, device: torch.device) -> Pipeline:
    """The demo, or a model of a released size with random weights."""
    if model == "demo":
        return Pipeline.from_pretrained("demo", device, **precision)
    return Pipeline(random_tokenizer(device), random_generator(model, device), **precision)


def in_words(pipe: Pipeline) -> str:
    made = pipe.metadata(SamplingParams())
    activations = f", activations {made['activation_dtype']}" if made["activation_dtype"] else ""
    return f"weights {made['weight_dtype']}{activations}, decode {made['decode_dtype']}"


class Asked:
    """Requests that were not asked for before: what is known of an image makes the next one like it faster."""

    def __init__(self, classes: int) -> None:
        self._classes, self._ids = classes, itertools.count()

    def next(self, count: int) -> list[Request]:
        return [Request(number % self._classes, number) for number in itertools.islice(self._ids, count)]


def call(pipe: Pipeline, request: Request) -> Any:
    return pipe([request.label], image_ids=[request.image_id], seed=SEED)


def seconds_alone(pipe: Pipeline, request: Request) -> float:
    begin = time.perf_counter()
    call(pipe, request)
    return time.perf_counter() - begin


def alone(pipe: Pipeline, requests: list[Request]) -> None:
    for request in requests:
        call(pipe, request)
    release_threads()  # of this thread: it is the engine's turn


def through(engine: Continuous, requests: list[Request]) -> None:
    for request in requests:
        engine.submit(request).result()
    engine.release_threads()


def agree(pipe: Pipeline, requests: list[Request], same: Same) -> None:
    """What `pipe()` gives for each of the requests is what every system must give."""
    for request in requests:
        samples = call(pipe, request)
        same.check(request, Answer(samples.pixels[0], samples.tokens[0]), ALONE)
    different = {tuple(answer.tokens.tolist()) for _, answer in same.first.values()}
    assert len(different) == len(requests), "different requests have the same image"


def rising(
    name: str, system, asks: dict[float, list[Request]], plan: Plan, solo: float, same: Same
) -> tuple[list[dict], str]:
    """A row for each load, and why there is none above; every system gets the same requests at the same times."""
    rows: list[dict] = []
    for load, requests in asks.items():
        rate = load / solo
        with OthersMonitor() as others:
            taken = offer(name, system, requests[: plan.requests(rate)], rate, same)
        rows.append({"load": load, "offered": rate, **taken.summary(), "others": others.cores})
        if why := why_stop(rows[-1], SLOWEST * solo):
            return rows, why
    return rows, "the highest load of the plan"


def offer(name: str, system, requests: list[Request], rate: float, same: Same) -> Load:
    """One load; raises where a request failed or had no answer, two answers, or another image than before."""
    due = arrivals(len(requests), rate, SEED)
    taken = drive(lambda number: system.submit(requests[number]), due, OUTSTANDING, (QueueFullError,))
    for request, outcome in zip(requests, taken.outcomes, strict=True):
        if outcome.end == FAILED:
            raise outcome.answer
        assert outcome.end != UNANSWERED and outcome.times == (outcome.end == ANSWERED), outcome
        if outcome.end == ANSWERED:
            same.check(request, outcome.answer, name)
    return taken
