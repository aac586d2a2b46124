"""How often a model's guesses are right, and what windows are worth with it on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alitok_fast.inference.params import SamplingParams, sampling_params
from alitok_fast.inference.sampler import Sampler
from alitok_fast.inference.step_model import StepModel, prepare
from alitok_fast.models.generator import Generator
from alitok_fast.ops.arguments import integer

PROBED_WINDOWS = (1, 2, 3, 4, 6, 8, 16)


@dataclass(frozen=True)
class WindowMeasure:
    """What one window was like.

    Attributes:
        window: `Sampler`'s.
        tokens_per_pass: tokens that a pass settled for an image, the mean of all batches.
        seconds: of a batch, the median.
        speedup: how many times faster than single tokens, the median of the rounds.
        rounds: batches that were timed.
    """

    window: int
    tokens_per_pass: float
    seconds: float
    speedup: float
    rounds: int


def probe(
    gen: Generator | StepModel,
    *,
    windows: Sequence[int] = PROBED_WINDOWS,
    batch_size: int = 1,
    seconds: float = 60.0,
    params: SamplingParams | None = None,
    clock: Callable[[], float] = time.perf_counter,
    **overrides: Any,
) -> list[WindowMeasure]:
    """Sample the same batches with each window in turn, for about so many seconds, and compare.

    The classes of a batch follow each other, so that all of them take part. The first round is timed only where there
    is no time for a second one. At least one round is done, however long it takes.

    Args:
        gen: as for `Sampler`.
        windows: 1..16, the first of which is compared with; usually 1.
        batch_size: images sampled together, 1 or more.
        seconds: > 0.
        params, overrides: settings as for `sample`; the seed is that of the first round, and counts up.

    Raises:
        TypeError, ValueError: for arguments that are no such numbers.
        RuntimeError: if two windows gave different tokens on a CPU, which would be a bug.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected a number above 0, got {seconds}")
    if not windows:
        raise ValueError("windows: expected at least one, got none")
    integer("batch_size", batch_size, 1)
    params, model = sampling_params(params, overrides), prepare(gen)
    samplers = {window: Sampler(model, window=window) for window in windows}
    exact = model.device.type == "cpu"  # on a GPU, products of more rows may be rounded otherwise
    begin, rounds = clock(), list[dict[int, tuple[float, float]]]()
    while True:
        start, labels = clock(), torch.arange(batch_size) + len(rounds) * batch_size
        rounds.append({})
        expected = None
        for window, sampler in samplers.items():
            before = clock()
            tokens = sampler(labels % model.config.num_classes, params, seed=params.seed + len(rounds) - 1)
            rounds[-1][window] = clock() - before, sampler.last_run.tokens_per_pass if sampler.last_run else 1.0
            if exact and expected is not None and not torch.equal(tokens, expected):
                raise RuntimeError(f"probe: expected window {window} to give the tokens of window {windows[0]}")
            expected = tokens
        if clock() + (clock() - start) > begin + seconds:
            break
    timed = rounds[1:] or rounds
    return [
        WindowMeasure(
            window=window,
            tokens_per_pass=statistics.mean(one[window][1] for one in timed),
            seconds=statistics.median(one[window][0] for one in timed),
            speedup=statistics.median(one[windows[0]][0] / one[window][0] for one in timed),
            rounds=len(timed),
        )
        for window in samplers
    ]


def probe_table(measures: Sequence[WindowMeasure], batch_size: int) -> str:
    """A table, and what it means."""
    lines = ["window  tokens/pass  s/image  speed"]
    for one in measures:
        lines.append(
            f"{one.window:6}  {one.tokens_per_pass:11.2f}  {one.seconds / batch_size:7.4f}  {one.speedup:4.2f}x"
        )
    best = max(measures, key=lambda one: one.speedup)
    lines.append(
        f"Medians of {best.rounds} batches of {batch_size}, the same images with every window. "
        f"Fastest: window {best.window}."
    )
    return "\n".join(lines)
