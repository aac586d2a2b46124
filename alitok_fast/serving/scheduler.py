"""The thread that samples: who joins, who leaves, when a pass is taken."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from alitok_fast.config import GeneratorConfig
from alitok_fast.inference.guesses import FirstGuesses
from alitok_fast.inference.sampler import guidance_schedule
from alitok_fast.inference.slots import Slot, SlotLoop
from alitok_fast.inference.thread_team import release_threads
from alitok_fast.serving.finisher import Finisher
from alitok_fast.serving.request import FAILURES, EngineClosedError, QueueFullError, Request
from alitok_fast.serving.stats import EngineStats, Recorder

IDLE_SECONDS = 1.0  # then the threads of torch go; to make new ones takes milliseconds
_log = logging.getLogger(__name__)


class Scheduler:
    """A queue of requests, the images that are being sampled, and the thread that takes their passes.

    With `beside` the finisher works in a thread of its own, otherwise between the passes.
    """

    def __init__(
        self, loop: SlotLoop, finisher: Finisher, recorder: Recorder, max_queue: int, guess: bool, beside: bool
    ) -> None:
        self._loop, self._finisher, self._recorder, self.max_queue = loop, finisher, recorder, max_queue
        self._config: GeneratorConfig = loop.model.config
        self._guesses = FirstGuesses(self._config.num_tokens) if guess else None
        self._running: dict[Slot, Request] = {}
        self._queue: deque[Request] = deque()
        self._wake = threading.Condition()  # guards the queue and the two below
        self._closing: str | None = None
        self._abandon = False
        self._failures = 0
        self._beside = beside
        finisher.on_broken = self._broken
        self._threads = [threading.Thread(target=self._work, name="alitok-engine", daemon=True)]
        if beside:
            self._threads.append(threading.Thread(target=finisher.run, name="alitok-finisher", daemon=True))
        for thread in self._threads:
            thread.start()

    # ---- for callers ----

    def put(self, request: Request) -> None:
        """Queue a request. Raises QueueFullError or EngineClosedError."""
        myself, asked = weakref.ref(self), weakref.ref(request)  # a future that is kept must not keep the cache

        def told(future: Future[Any]) -> None:
            if future.cancelled() and (scheduler := myself()) is not None and (request := asked()) is not None:
                scheduler._forget(request)

        request.future.add_done_callback(told)
        with self._wake:
            self._check_open()
            self._queue.append(request)
            self._wake.notify_all()

    def put_call(self, future: Future[Any], work: Callable[[], Any]) -> None:
        """Queue a call for the finisher; raises as `put`."""
        finisher = weakref.ref(self._finisher)

        def told(future: Future[Any]) -> None:
            if future.cancelled() and (calls := finisher()) is not None:
                calls.drop_call(future)

        future.add_done_callback(told)
        with self._wake:
            self._check_open()
            self._finisher.put_call(future, work)
            self._wake.notify_all()

    @property
    def alive(self) -> bool:
        return self._closing is None

    def stats(self) -> EngineStats:
        recorder, loop, waiting = self._recorder, self._loop, len(self._queue) + self._finisher.calls
        now = waiting, self.max_queue, loop.sequences_in_use, loop.sequences, len(self._running)
        done = recorder.passes, recorder.image_passes, recorder.tokens, recorder.busy_seconds
        return EngineStats(*now, recorder.requests(), *done, recorder.latency())

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests; see `Engine.close`."""
        ends = None if timeout is None else time.monotonic() + timeout
        with self._wake:
            self._closing = self._closing or "it was closed"
            self._abandon = self._abandon or not drain
            self._wake.notify_all()
        if threading.current_thread() in self._threads:  # the last reference was dropped by a callback
            return False
        self._join(ends)
        with self._wake:
            self._abandon = True
            self._wake.notify_all()
        if self._beside and not self._threads[0].is_alive():  # it has told the finisher to do what is there
            self._finisher.stop(self._unfinished())
        self._join(None)
        return True

    def abandon(self, seconds: float = 5.0) -> None:
        """For the end of an engine that nobody holds: it waits no longer, since the collector may call at any point."""
        with self._wake:
            self._closing, self._abandon = self._closing or "nobody held it any more", True
            self._wake.notify_all()
        if threading.current_thread() not in self._threads:
            self._join(time.monotonic() + seconds)

    def _join(self, ends: float | None) -> None:
        for thread in self._threads:
            thread.join(None if ends is None else min(max(0.0, ends - time.monotonic()), threading.TIMEOUT_MAX))

    # ---- the queue, under its lock ----

    def _check_open(self) -> None:
        if self._closing is not None:
            raise EngineClosedError(
                f"engine: expected one that is open, got one that takes no requests: {self._closing}"
            )
        room = (self._loop.sequences - self._loop.sequences_in_use) // 2  # who joins at once does not wait
        if len(self._queue) + self._finisher.calls >= self.max_queue + room:
            self._recorder.ended("rejected")
            raise QueueFullError(f"queue: expected fewer than {self.max_queue} images that wait, got as many")

    def _forget(self, request: Request) -> None:
        """A request was cancelled: out of the queue with it. One that runs is noticed at the next pass."""
        with self._wake:
            if request in self._queue:
                self._queue.remove(request)
                request.future.set_running_or_notify_cancel()
                self._recorder.ended("cancelled")
            self._wake.notify_all()

    def _next(self) -> Request | None:
        """The request that may join now."""
        with self._wake:
            if self._queue and self._loop.has_room(self._queue[0].params.guided):
                return self._queue.popleft()
        return None

    # ---- the thread that samples ----

    def _work(self) -> None:
        try:
            device = self._loop.model.device
            if device.type == "cuda":
                torch.cuda.set_device(device)
            self._loop.warm_up()
            self._serve()
        except BaseException as error:  # nobody may wait for a thread that has ended
            _log.exception("the engine ended")
            self._broken(f"it ended with an error ({error})")
        finally:
            self._give_up()

    def _serve(self) -> None:
        while True:
            with self._wake:
                while self._idle():
                    # Before a wait that has timed out gets the lock again, somebody may have come.
                    if not self._wake.wait(IDLE_SECONDS) and self._idle():
                        release_threads()  # who else computes in this process is faster without them
                        self._wake.wait()
                if self._abandon or (self._closing and not (self._queue or self._running or self._finishing)):
                    return
            self._drop()
            self._admit()
            if self._running:
                self._turn()
            if not self._beside:
                # While requests wait for a place, throughput is what counts: a batch costs less than its images.
                self._finisher.work(patient=bool(self._queue and self._running))

    def _idle(self) -> bool:
        return not (self._queue or self._running or self._finishing or self._closing)

    @property
    def _finishing(self) -> int:
        return 0 if self._beside else self._finisher.waiting

    def _drop(self) -> None:
        """Let go of what was cancelled or took too long."""
        with self._wake:
            late = [request for request in self._queue if request.expired]
            for request in late:
                self._queue.remove(request)
        for request in late:
            self._recorder.ended("timed_out" if request.fail(request.late()) else "cancelled")
        for slot, request in list(self._running.items()):
            if request.future.cancelled():
                request.future.set_running_or_notify_cancel()
                self._recorder.ended("cancelled")
                self._let_go(slot)
            elif request.expired:
                self._recorder.ended("timed_out" if request.fail(request.late()) else "cancelled")
                self._let_go(slot)

    def _admit(self) -> None:
        while (request := self._next()) is not None:
            request.joined = time.monotonic()
            self._recorder.took("queued", request.joined - request.submitted)
            params, config = request.params, self._config
            try:
                schedule = guesses = None
                if params.guided:
                    assert params.guidance_scale is not None and params.guidance_power is not None
                    schedule = guidance_schedule(config.num_tokens, params.guidance_scale, params.guidance_power)
                if self._guesses is not None:
                    guesses = self._guesses.guesses(torch.tensor([request.label]))[0]
                slot = self._loop.join(request.label, schedule, params, request.image_id, request.prompt, guesses)
            except Exception as error:
                self._recorder.ended("failed" if request.fail(error) else "cancelled")
                self._failed(error)
                continue
            self._running[slot] = request

    def _turn(self) -> None:
        begin, before = time.perf_counter(), sum(slot.known for slot in self._running)
        try:
            passes = self._loop.turn()
            done = sum(slot.known for slot in self._running) - before
            self._recorder.turn(passes, len(self._running), done, time.perf_counter() - begin)
            for slot, request in list(self._running.items()):
                self._look_at(slot, request)
            self._failures = 0
        except Exception as error:  # of the model or the device: of all images
            _log.exception("a pass failed; %d requests end with the error", len(self._running))
            for slot, request in list(self._running.items()):
                self._let_go(slot)
                self._recorder.ended("failed" if request.fail(error) else "cancelled")
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        """A pass or a beginning failed: what fails again and again is the model or the device."""
        self._failures += 1
        if self._failures >= FAILURES:
            self._broken(f"it failed {FAILURES} times, one after the other ({error})")

    def _broken(self, why: str) -> None:
        with self._wake:
            self._closing, self._abandon = why, True
            self._wake.notify_all()

    def _look_at(self, slot: Slot, request: Request) -> None:
        """Hand on what a pass has settled: the image where it is done, rows where somebody watches."""
        config = self._config
        if slot.known == config.num_tokens:
            request.sampled = time.monotonic()
            request.passes = self._loop.passes(slot)
            tokens = self._loop.tokens(slot)
            bad = (tokens < 0).nonzero()
            if self._guesses is not None and not bad.numel():
                self._guesses.remember(torch.tensor([request.label]), tokens[None])
            self._leave(slot)
            if bad.numel():
                error = RuntimeError(
                    f"sampling: expected finite logits, got NaN or infinity at step {int(bad[0])}; "
                    "the weights or the precision are at fault"
                )
                self._recorder.ended("failed" if request.fail(error) else "cancelled")
                return
            self._finisher.put_image(request, tokens)
        elif request.on_rows is not None:
            rows = (slot.known - config.num_prefix_tokens) // config.grid
            if rows > request.rows:
                request.rows = rows
                tokens = self._loop.tokens(slot)[: config.num_prefix_tokens + rows * config.grid]
                if not bool((tokens < 0).any()):
                    self._finisher.put_rows(request, tokens)

    def _leave(self, slot: Slot) -> None:
        self._loop.leave(slot)
        self._finisher.drop_rows(self._running.pop(slot))  # last: what runs is answered, whatever fails

    def _let_go(self, slot: Slot) -> None:
        """`_leave` where something has failed already, and this may too."""
        try:
            self._leave(slot)
        except Exception as error:
            self._broken(f"an image could not leave ({error})")
            self._finisher.drop_rows(self._running.pop(slot))

    def _unfinished(self) -> EngineClosedError:
        return EngineClosedError(f"engine: expected to finish this request, but {self._closing}")

    def _give_up(self) -> None:
        """End: what is not done yet gets an error."""
        error, running = self._unfinished(), list(self._running.items())
        try:
            with self._wake:
                waiting = list(self._queue)
                self._queue.clear()
            for slot, _ in running:
                self._let_go(slot)
            for request in [*(request for _, request in running), *waiting]:
                self._recorder.ended("failed" if request.fail(error) else "cancelled")
        finally:
            self._finisher.stop(error if self._abandon else None)
