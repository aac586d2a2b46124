"""Requests that arrive at times fixed beforehand, whatever becomes of those before them: an open loop.

A closed loop sends the next request when an answer has come, so a slow system is asked less often and its delays are
left out of the sample (coordinated omission). Here latency counts from the moment at which a request was due.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
BOUNDS = (2.0, 3.0, 5.0, 10.0)  # of p95 in a report, times the time of an image alone
KEEPS_UP = 0.7  # of the offered rate, at least; in a short run the last answers alone cost some of it
ANSWERED, REFUSED, FAILED, UNANSWERED = ENDS = ("answered", "refused", "failed", "unanswered")


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When `count` requests are due, in seconds: a Poisson process given that it has so many in count / rate seconds.

    Given their number, the arrivals of a Poisson process are independent and uniform. So the offered rate is exact also
    where there are few, and another rate with the same seed has the same pattern, faster or slower.
    """
    uniform = random.Random(seed)
    return sorted(uniform.random() * count / rate for _ in range(count))


class Clock:
    """Real time; tests have one of their own."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, moment: float) -> None:
        while (left := moment - self.now()) > 0:
            time.sleep(left)

    def wait(self, changed: threading.Condition, done: Callable[[], bool], seconds: float) -> None:
        """Until `done` or for so many seconds; whoever changes what `done` says notifies `changed`."""
        with changed:
            changed.wait_for(done, seconds)


@dataclass
class Outcome:
    """What became of a request; moments in seconds from the start of the load."""

    due: float
    sent: float
    end: str = UNANSWERED
    answered: float = math.inf
    answer: Any = None
    """Of the system, or the exception where it failed."""
    times: int = 0
    """That an answer came."""

    @property
    def latency(self) -> float:
        return self.answered - self.due

    @property
    def late(self) -> float:
        """Of the generator."""
        return self.sent - self.due


@dataclass(frozen=True)
class Load:
    """All requests of one load, in the order in which they were due."""

    outcomes: list[Outcome]

    def summary(self) -> dict[str, Any]:
        """As JSON values. Latencies are of what was answered; a quantile is the smallest one that such a share of the
        requests did not exceed."""
        ends = Counter(one.end for one in self.outcomes)
        done = [one for one in self.outcomes if one.end == ANSWERED]
        latencies, late = sorted(one.latency for one in done), sorted(one.late for one in self.outcomes)
        latency = {name: quantile(latencies, share) for name, share in QUANTILES.items()} if done else None
        return {
            "requests": len(self.outcomes),
            **{end: ends[end] for end in ENDS},
            "images_per_second": len(done) / max(one.answered for one in done) if done else 0.0,
            "latency": latency and {**latency, "most": latencies[-1]},
            "late": {"median": quantile(late, 0.5), "most": late[-1]} if late else None,
        }


def quantile(ascending: Sequence[float], share: float) -> float:
    """By nearest rank: no value that was not measured."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def drive(
    submit: Callable[[int], Future],
    due: Sequence[float],
    most_outstanding: int,
    refusals: tuple[type[Exception], ...] = (),
    patience: float = 600.0,
    clock: Clock | None = None,
) -> Load:
    """Call `submit` with the number of each request when it is due, and wait for all answers.

    A request is refused, and counted so, where `most_outstanding` wait for their answers or `submit` raises one of
    `refusals`. What is not answered `patience` seconds after the last was sent is counted as unanswered. Callers of
    `submit` must not be held up by it; where they are, latency counts from the due time all the same.
    """
    clock = clock or Clock()
    outcomes: list[Outcome] = []
    changed, outstanding = threading.Condition(), 0

    def note(outcome: Outcome, future: Future) -> None:
        nonlocal outstanding
        moment = clock.now() - begin
        with changed:
            outcome.times += 1
            error = future.exception()
            outcome.answered, outcome.end = moment, ANSWERED if error is None else FAILED
            outcome.answer = future.result() if error is None else error
            outstanding -= 1
            changed.notify_all()

    begin = clock.now()
    for index, moment in enumerate(due):
        clock.sleep_until(begin + moment)
        outcome = Outcome(moment, clock.now() - begin)
        outcomes.append(outcome)
        with changed:
            full = outstanding >= most_outstanding
            outstanding += not full
        if full:
            outcome.end = REFUSED
            continue
        try:
            future = submit(index)
        except refusals:
            outcome.end = REFUSED
            with changed:
                outstanding -= 1
            continue
        future.add_done_callback(lambda future, outcome=outcome: note(outcome, future))
    clock.wait(changed, lambda: outstanding == 0, patience)
    with changed:  # what comes later changes copies
        return Load([Outcome(**vars(outcome)) for outcome in outcomes])


def held(rows: Sequence[Mapping[str, Any]], bound: float) -> float | None:
    """The most images a second that was measured with every request answered and p95 within `bound` seconds; None where
    there is none. Nothing is interpolated."""
    within = [row["images_per_second"] for row in rows if row["answered"] == row["requests"]
              and row["latency"]["p95"] <= bound]  # fmt: skip
    return max(within, default=None)


def why_stop(row: Mapping[str, Any], bound: float) -> str | None:
    """Why a higher load would tell nothing more: p95 above `bound` seconds, or the system did not keep up."""
    if row["answered"] < row["requests"]:
        return f"{row['requests'] - row['answered']} of {row['requests']} requests refused or without an answer"
    if row["latency"]["p95"] > bound:
        return f"p95 above {bound:.3g} s"
    if row["images_per_second"] < KEEPS_UP * row["offered"]:
        return f"less than {KEEPS_UP:.0%} of the offered rate"
    return None
