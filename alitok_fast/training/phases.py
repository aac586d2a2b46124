"""Phases of a run: how long, at which learning rate, with which losses; and where in them a step lies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from alitok_fast.config import Config

GENERATOR_TURN, DISCRIMINATOR_TURN = "model", "discriminator"


@dataclass(frozen=True)
class Phase(Config):
    """A stretch of `steps` steps. The learning rate falls from `lr` to `end_lr` (`lr` if None) along a cosine.

    `perceptual`, `lpips` and `adversarial` weigh the tokenizer's losses beside its reconstruction error (section 3.2):
    the error of a classifier's logits, LPIPS, and the discriminator's. While `adversarial` is above 0, steps of the
    tokenizer and of the discriminator alternate, and each counts.
    """

    steps: int
    lr: float
    end_lr: float | None = None
    perceptual: float = 0.0
    lpips: float = 0.0
    adversarial: float = 0.0

    def __post_init__(self) -> None:
        self._check("steps", type(self.steps) is int and self.steps >= 1, "a whole number of at least 1")
        for name in ("lr", "perceptual", "lpips", "adversarial"):
            self._check(name, _finite(getattr(self, name)) and getattr(self, name) >= 0, "0 or a positive number")
        self._check("lr", self.lr > 0, "a positive number")
        if self.end_lr is not None:
            self._check("end_lr", _finite(self.end_lr) and 0 <= self.end_lr <= self.lr, f"0 to lr ({self.lr})")

    def _check(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"phase.{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def last_lr(self) -> float:
        return self.lr if self.end_lr is None else self.end_lr


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Place(NamedTuple):
    """Where a step lies: the number of its phase, the phase, its step in it, and what it trains."""

    number: int
    phase: Phase
    step: int
    turn: str


class Schedule:
    """The phases of a run of `steps` steps: those beyond are cut off, and the last one goes on if they are fewer.

    The learning rate rises linearly from 0 during the first `warmup` steps of the first phase, then follows each
    phase's cosine.
    """

    def __init__(self, phases: Sequence[Phase], steps: int, warmup: int) -> None:
        self.phases, self.warmup = _fitted(phases, steps), warmup
        self._begins = [sum(phase.steps for phase in self.phases[:i]) for i in range(len(self.phases))]

    def at(self, step: int) -> Place:
        number = max(i for i, begin in enumerate(self._begins) if begin <= step)
        phase, within = self.phases[number], step - self._begins[number]
        # The first step of a phase is the tokenizer's, the next one the discriminator's.
        turn = DISCRIMINATOR_TURN if phase.adversarial and within % 2 else GENERATOR_TURN
        return Place(number, phase, within, turn)

    def lr(self, step: int) -> float:
        number, phase, within, _ = self.at(step)
        if step < self.warmup:
            return phase.lr * step / self.warmup
        begin = min(self.warmup, phase.steps) if number == 0 else 0
        progress = min(1.0, (within - begin) / max(1, phase.steps - begin))
        return phase.last_lr + (phase.lr - phase.last_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def adversarial(self) -> bool:
        return any(phase.adversarial for phase in self.phases)


def _fitted(phases: Sequence[Phase], steps: int) -> list[Phase]:
    fitted, left = [], steps
    for phase in phases:
        if left > 0:
            fitted.append(dataclasses.replace(phase, steps=min(phase.steps, left)))
            left -= phase.steps
    if left > 0:
        fitted[-1] = dataclasses.replace(fitted[-1], steps=fitted[-1].steps + left)
    return fitted


class Plateau:
    """Lowers the learning rate where the loss has stopped falling, as the authors did by hand.

    `see` takes the mean loss since the last call; without a new best, by `threshold` of it, for `patience` steps, the
    rate is multiplied by `factor`. A new phase begins anew.
    """

    def __init__(self, patience: int, factor: float, threshold: float = 0.002) -> None:
        self.patience, self.factor, self.threshold = patience, factor, threshold
        self.scale, self.best, self.since, self.phase = 1.0, math.inf, 0, 0

    def enter(self, phase: int) -> None:
        if phase != self.phase:
            self.scale, self.best, self.since, self.phase = 1.0, math.inf, 0, phase

    def see(self, loss: float, steps: int) -> None:
        """`loss` is the mean over the last `steps` steps."""
        if not self.patience:
            return
        self.since += steps
        if loss < self.best * (1 - self.threshold):
            self.best, self.since = loss, 0
        elif self.since >= self.patience:
            self.scale, self.since = self.scale * self.factor, 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "best": self.best, "since": self.since, "phase": self.phase}

    def load(self, state: dict[str, float]) -> None:
        self.scale, self.best = float(state["scale"]), float(state["best"])
        self.since, self.phase = int(state["since"]), int(state["phase"])
