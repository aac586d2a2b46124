"""What an engine has done and is doing, as numbers."""

from __future__ import annotations

import bisect
import threading
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

QUANTILES = (0.5, 0.95, 0.99)
REMEMBERED = 1024  # requests that quantiles are of
BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)  # seconds
ENDS = ("finished", "failed", "cancelled", "timed_out", "rejected")
TIMES = ("queued", "first_row", "image")


@dataclass(frozen=True)
class Latency:
    """Seconds of one kind: quantiles of the last 1,024 requests, and a histogram of all.

    Attributes:
        quantiles: by probability; empty while there is nothing.
        counts: how many took up to each of `BUCKETS`, and after the last bucket how many there were.
        total: seconds of all together.
    """

    quantiles: dict[float, float]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True)
class EngineStats:
    """A moment of an engine.

    Attributes:
        queue_length, queue_limit: requests that wait, and how many may.
        sequences_in_use, sequences: of the cache; a guided image takes two.
        running: images that are being sampled.
        requests: how many ended how, by `ENDS`.
        passes: passes of the generator, each for all images that were there.
        image_passes: the same, counted once for each image.
        tokens: that were settled.
        busy_seconds: in passes.
        latency: by kind: "queued", "first_row", "image".
    """

    queue_length: int
    queue_limit: int
    sequences_in_use: int
    sequences: int
    running: int
    requests: dict[str, int]
    passes: int
    image_passes: int
    tokens: int
    busy_seconds: float
    latency: dict[str, Latency]


class Recorder:
    """Counts what happens; several threads may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: Counter[str] = Counter()
        self._last = {kind: deque[float](maxlen=REMEMBERED) for kind in TIMES}
        self._counts = {kind: [0] * (len(BUCKETS) + 1) for kind in TIMES}
        self._totals = dict.fromkeys(TIMES, 0.0)
        self.passes = self.image_passes = self.tokens = 0
        self.busy_seconds = 0.0

    def ended(self, how: str) -> None:
        with self._lock:
            self._ends[how] += 1

    def took(self, kind: str, seconds: float) -> None:
        with self._lock:
            self._last[kind].append(seconds)
            self._counts[kind][bisect.bisect_left(BUCKETS, seconds)] += 1
            self._totals[kind] += seconds

    def turn(self, passes: int, images: int, tokens: int, seconds: float) -> None:
        with self._lock:
            self.passes += passes
            self.image_passes += passes * images
            self.tokens += tokens
            self.busy_seconds += seconds

    def requests(self) -> dict[str, int]:
        with self._lock:
            return {end: self._ends[end] for end in ENDS}

    def latency(self) -> dict[str, Latency]:
        with self._lock:
            found = {}
            for kind in TIMES:
                last = list(self._last[kind])
                quantiles = dict(zip(QUANTILES, np.quantile(last, QUANTILES).tolist(), strict=True)) if last else {}
                counts = tuple(np.cumsum(self._counts[kind]).tolist())
                found[kind] = Latency(quantiles, counts, self._totals[kind])
            return found
