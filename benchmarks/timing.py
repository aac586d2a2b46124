"""Contenders take turns, round after round, so that a change of clock or a busy neighbour meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Parts = Mapping[str, float]


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    `run` does it once, and may return the seconds of its parts by name. `warm` is what to do before anything is timed;
    None is `run` itself, which a contender that takes minutes cannot afford. `before` runs untimed before each round.
    `facts` go into the report as they are. `floor` says how many seconds the parts need at least where memory is read
    at so many bytes a second; `predicted`, how many all of it or the part that a model knows takes there.
    """

    run: Callable[[], Any]
    warm: Callable[[], Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[], Any] | None = None
    floor: Callable[[float], Parts] | None = None
    predicted: Callable[[float], float] | None = None


@dataclass(frozen=True)
class Missing:
    """A contender that cannot take part, and why: the report says so."""

    reason: str


class Turns:
    """The times of contenders that take turns.

    The first one's rounds follow from how long it takes, at least one and at most `most`; each other joins a round
    while its own `budget` of seconds lasts, at least once.
    """

    def __init__(
        self,
        contenders: Mapping[str, Contender],
        budget: float,
        most: int,
        synchronize: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.contenders, self.budget, self.synchronize, self.clock = dict(contenders), budget, synchronize, clock
        self.first = next(iter(self.contenders))
        self.seconds: dict[str, list[float]] = {name: [] for name in self.contenders}
        self.parts: dict[str, list[Parts]] = {name: [] for name in self.contenders}
        for contender in list(self.contenders.values())[1:]:
            (contender.warm or contender.run)()  # caches, autotuning, compilation
        self.rounds = max(1, min(most, int(budget / max(self._estimate(most), 1e-9))))

    def _estimate(self, most: int) -> float:
        """Seconds of the first contender once warm; what takes a second is slow enough to count when cold."""
        first = self.contenders[self.first]
        warm, _ = self._timed(first) if first.warm is None else (first.warm(), None)
        if most == 1:
            return 0.0
        return warm if first.warm is None and warm >= 1.0 else self._timed(first)[0]

    def take(self, name: str) -> None:
        seconds, parts = self._timed(self.contenders[name])
        self.seconds[name].append(seconds)
        if parts is not None:
            self.parts[name].append(parts)

    def others_take(self) -> None:
        """Once for each other contender that has time left."""
        for name, taken in self.seconds.items():
            if name != self.first and (not taken or sum(taken) + statistics.mean(taken) <= self.budget):
                self.take(name)

    def summary(self) -> dict[str, dict[str, Any]]:
        """By name: median, fastest, slowest, rounds, how many times longer than the first (`times`), parts, facts."""
        own = self.seconds[self.first]
        return {
            name: {
                "seconds": spread(taken),
                # The first ran right after each of these, so a ratio compares the same moment.
                "times": statistics.median(b / a for a, b in zip(own, taken, strict=False)),
                "parts": _median_parts(self.parts[name]),
                **self.contenders[name].facts,
            }
            for name, taken in self.seconds.items()
        }

    def _timed(self, contender: Contender) -> tuple[float, Parts | None]:
        if contender.before is not None:
            contender.before()
        self.synchronize()
        begin = self.clock()
        parts = contender.run()
        self.synchronize()
        return self.clock() - begin, parts if isinstance(parts, dict) else None


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "rounds": len(seconds),
    }


def _median_parts(rounds: Sequence[Parts]) -> dict[str, float]:
    return {name: statistics.median(parts[name] for parts in rounds) for name in (rounds[0] if rounds else ())}
