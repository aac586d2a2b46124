"""The systems that a report compares, ours and others', behind one interface."""

from __future__ import annotations

import time
from typing import Protocol

from torch import Tensor

from alitok_fast.models import Generator
from ceilings import synchronize
from timing import Contender


class System(Protocol):
    """Samples images of one batch size; `error` bounds its logits and pixels (`bench_sampling.check`)."""

    error: float

    def logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """(B, n + 1, K) conditional logits after labels (B,) and tokens (B, n), on the path that sampling takes."""

    def generate(self, labels: Tensor) -> Tensor:
        """tokens (B, N) with guidance."""

    def decode(self, tokens: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1]."""


def contender(system: System, labels: Tensor, warm=None, floor=None, predicted=None, **facts) -> Contender:
    """Whole images of `labels`, timed in two parts. `warm`, `floor`, `predicted` and `facts` as in `Contender`."""

    def run() -> dict[str, float]:
        begin = time.perf_counter()
        tokens = system.generate(labels)
        synchronize(labels.device)
        middle = time.perf_counter()
        system.decode(tokens)
        synchronize(labels.device)
        return {"tokens": middle - begin, "stage-2 decode": time.perf_counter() - middle}

    return Contender(run, warm, facts, floor=floor, predicted=predicted)


def conditions(gen: Generator, labels: Tensor, tokens: Tensor) -> list[Tensor]:
    """The ids of each step: the labels' conditions, then the tokens' columns."""
    return [gen.condition_ids(labels, len(labels)), *tokens.T.contiguous()]
