"""Three ways to answer requests that come one by one: `submit(request)` gives a future of an answer."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from alitok_fast.inference.thread_team import release_threads
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.serving import Engine, GeneratedImage

ENGINE, ONE, BATCHES = SYSTEMS = ("Engine", "one at a time", "static batches")
LEVELS = 2  # grey levels of 255 by which pixels may differ: a decode of several images rounds in other places
MOST, WAIT = 8, 0.05  # images of a static batch, seconds from the arrival of its first


@dataclass(frozen=True)
class Request:
    label: int
    image_id: int


@dataclass(frozen=True)
class Answer:
    pixels: np.ndarray
    tokens: Tensor


@dataclass
class Same:
    """The first answer to each request. Later ones must have the same tokens, and the same pixels to rounding."""

    first: dict[Request, tuple[str, Answer]] = field(default_factory=dict)
    """With who gave it."""
    compared: int = 0
    rounded: int = 0
    """Of those compared, how many had a pixel that differed."""
    levels: int = 0
    """Grey levels by which a pixel differed, at the most."""

    def check(self, request: Request, answer: Answer | GeneratedImage, system: str) -> None:
        given = Answer(answer.pixels, answer.tokens)
        if self.first.setdefault(request, (system, given))[1] is given:
            return
        who, before = self.first[request]
        assert before.tokens.equal(given.tokens), f"{request}: {system} has other tokens than {who}"
        levels = int(np.abs(before.pixels.astype(np.int16) - given.pixels).max())
        assert levels <= LEVELS, f"{request}: {system} has pixels {levels} grey levels from those of {who}"
        self.compared, self.rounded = self.compared + 1, self.rounded + bool(levels)
        self.levels = max(self.levels, levels)

    def summary(self) -> dict[str, int]:
        return {"compared": self.compared, "rounded": self.rounded, "levels": self.levels}


class Continuous:
    """Our engine."""

    def __init__(self, pipe: Pipeline, seed: int) -> None:
        self._engine, self._seed = Engine(pipe), seed

    def submit(self, request: Request) -> Future[GeneratedImage]:
        return self._engine.submit(request.label, image_id=request.image_id, seed=self._seed)

    def release_threads(self) -> None:
        """Of the engine's thread, which is where calls run on a CPU."""
        self._engine.call(release_threads).result()

    def close(self) -> None:
        self._engine.close()


class Batches:
    """A queue and one worker, which calls the pipeline with up to `most` requests at a time.

    It takes those that wait, and for fewer than `most` waits until the first of them has been there for `wait` seconds.
    With `most` 1 requests are answered one at a time. A batch has one set of settings, so its seed is everyone's, and
    the noise of an image is keyed by its id.
    """

    def __init__(self, pipe: Pipeline, seed: int, most: int = 1, wait: float = 0.0) -> None:
        self._pipe, self._seed, self._most, self._wait = pipe, seed, most, wait
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._open = True
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def submit(self, request: Request) -> Future[Answer]:
        future: Future[Answer] = Future()
        self._queue.put((request, future, time.monotonic()))
        return future

    def close(self) -> None:
        """Answer what is there, and end."""
        self._queue.put(None)
        self._worker.join()

    def _work(self) -> None:
        while self._open:
            batch = self._collect()
            if not batch:
                continue
            requests, futures = zip(*batch, strict=True)
            try:
                samples = self._pipe(
                    [request.label for request in requests],
                    image_ids=[request.image_id for request in requests],
                    seed=self._seed,
                )
            except Exception as error:
                for future in futures:
                    future.set_exception(error)
                continue
            for future, pixels, tokens in zip(futures, samples.pixels, samples.tokens, strict=True):
                future.set_result(Answer(pixels, tokens))

    def _collect(self) -> list[tuple[Request, Future[Answer]]]:
        batch: list[tuple[Request, Future[Answer]]] = []
        until = None
        while len(batch) < self._most:
            try:
                item = self._queue.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                self._open = False
                break
            request, future, came = item
            until = came + self._wait if until is None else until
            batch.append((request, future))
        return batch


def make(name: str, pipe: Pipeline, seed: int) -> Continuous | Batches:
    if name == ENGINE:
        return Continuous(pipe, seed)
    return Batches(pipe, seed) if name == ONE else Batches(pipe, seed, MOST, WAIT)
