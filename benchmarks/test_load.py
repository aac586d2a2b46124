"""The load generator, with systems whose service time is known and a clock that moves only when it is told to."""

from __future__ import annotations

import heapq
import statistics
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from load import ANSWERED, FAILED, REFUSED, UNANSWERED, Clock, arrivals, drive, held, quantile, why_stop
from peers.serving import LEVELS, Answer, Batches, Request, Same


class Virtual(Clock):
    """Time passes at once; what is to happen meanwhile happens at its moment."""

    def __init__(self) -> None:
        self.moment, self.events = 0.0, []

    def now(self) -> float:
        return self.moment

    def at(self, moment: float, action) -> None:
        heapq.heappush(self.events, (moment, len(self.events), action))

    def sleep_until(self, moment: float) -> None:
        while self.events and self.events[0][0] <= moment:
            self._next()
        self.moment = max(self.moment, moment)

    def wait(self, changed, done, seconds: float) -> None:
        limit = self.moment + seconds
        while not done() and self.events and self.events[0][0] <= limit:
            self._next()

    def _next(self) -> None:
        moment, _, action = heapq.heappop(self.events)
        self.moment = max(self.moment, moment)
        action()


class Server:
    """Answers one request after the other, `service` seconds each, with the request's number."""

    def __init__(self, clock: Virtual, service: float) -> None:
        self.clock, self.service, self.free, self.asked = clock, service, 0.0, []

    def submit(self, index: int) -> Future:
        future: Future = Future()
        self.asked.append(index)
        self.free = max(self.free, self.clock.now()) + self.service
        self.clock.at(self.free, lambda: future.set_result(index))
        return future


def serve(due, service: float, most: int = 100, **options):
    clock = Virtual()
    server = Server(clock, service)
    return drive(server.submit, due, most, clock=clock, **options), server


def test_arrivals_are_reproducible_and_have_the_rate():
    due = arrivals(500, 20.0, seed=3)
    assert due == arrivals(500, 20.0, seed=3) == sorted(due) and due != arrivals(500, 20.0, seed=4)
    assert 0.0 <= due[0] and due[-1] <= 25.0
    assert arrivals(500, 10.0, seed=3) == pytest.approx([2 * moment for moment in due])
    gaps = np.diff(due)  # exponential: as large a deviation as mean
    assert statistics.mean(gaps) == pytest.approx(0.05, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.15)


def test_latency_is_the_queueing_that_can_be_worked_out_by_hand():
    load, _ = serve([0.0, 1.0, 2.0, 10.0], service=2.0)
    assert [one.latency for one in load.outcomes] == [2.0, 3.0, 4.0, 2.0]
    summary = load.summary()
    assert summary["latency"] == {"p50": 2.0, "p95": 4.0, "p99": 4.0, "most": 4.0}
    assert summary["images_per_second"] == 4 / 12 and summary["late"] == {"median": 0.0, "most": 0.0}


def test_latency_counts_from_the_due_time_where_the_system_holds_up_the_generator():
    clock = Virtual()

    def submit(index: int) -> Future:
        clock.sleep_until(clock.now() + 5.0)  # blocks as long as it works
        future: Future = Future()
        future.set_result(index)
        return future

    load = drive(submit, [0.0, 1.0, 2.0], 100, clock=clock)
    assert [one.latency for one in load.outcomes] == [5.0, 9.0, 13.0]
    assert [one.late for one in load.outcomes] == [0.0, 4.0, 8.0]
    assert load.summary()["late"] == {"median": 4.0, "most": 8.0}


def test_arrivals_do_not_wait_for_answers():
    load, server = serve(arrivals(50, 10.0, seed=0), service=1.0)
    assert server.asked == list(range(50))
    assert max(one.sent for one in load.outcomes) <= 5.0 and load.outcomes[-1].answered >= 50.0


def test_nothing_is_lost_or_answered_twice():
    load, _ = serve(arrivals(200, 9.0, seed=1), service=0.1)
    assert [one.answer for one in load.outcomes] == list(range(200))
    assert {one.times for one in load.outcomes} == {1} and {one.end for one in load.outcomes} == {ANSWERED}
    assert all(one.latency >= 0.1 - 1e-9 for one in load.outcomes)


def test_requests_above_the_limit_are_refused_and_counted():
    load, server = serve([0.0, 0.1, 0.2, 0.3, 2.5], service=1.0, most=2)
    assert [one.end for one in load.outcomes] == [ANSWERED, ANSWERED, REFUSED, REFUSED, ANSWERED]
    assert server.asked == [0, 1, 4]
    summary = load.summary()
    assert (summary["requests"], summary["answered"], summary["refused"]) == (5, 3, 2)
    assert [one.times for one in load.outcomes] == [1, 1, 0, 0, 1]


def test_what_the_system_refuses_is_counted_and_other_errors_are_not_swallowed():
    clock = Virtual()
    server = Server(clock, 1.0)

    def submit(index: int) -> Future:
        if index % 2:
            raise BlockingIOError
        return server.submit(index)

    load = drive(submit, [0.0, 0.0, 0.0], 100, (BlockingIOError,), clock=clock)
    assert load.summary()["refused"] == 1 and load.summary()["answered"] == 2
    with pytest.raises(BlockingIOError):
        drive(submit, [0.0, 0.0], 100, clock=clock)


def test_failures_and_answers_that_never_come_are_counted():
    clock = Virtual()

    def submit(index: int) -> Future:
        future: Future = Future()
        if index == 0:
            clock.at(1.0, lambda: future.set_exception(ValueError("broken")))
        elif index == 1:
            clock.at(1.0, lambda: future.set_result(None))
        return future

    load = drive(submit, [0.0, 0.0, 0.0], 100, patience=30.0, clock=clock)
    assert [one.end for one in load.outcomes] == [FAILED, ANSWERED, UNANSWERED]
    summary = load.summary()
    assert (summary["failed"], summary["answered"], summary["unanswered"]) == (1, 1, 1)
    nothing = drive(lambda index: Future(), [0.0], 100, patience=1.0, clock=clock).summary()
    assert nothing["latency"] is None and nothing["images_per_second"] == 0.0


def test_real_time_and_threads():
    def submit(index: int) -> Future:
        future: Future = Future()
        threading.Timer(0.002, future.set_result, (index,)).start()
        return future

    load = drive(submit, arrivals(40, 2000.0, seed=0), 100)
    assert [one.answer for one in load.outcomes] == list(range(40))
    assert all(one.late >= 0 and one.latency > 0 and one.times == 1 for one in load.outcomes)


def test_quantiles_are_measured_values():
    ascending = [float(n) for n in range(1, 101)]
    assert [quantile(ascending, share) for share in (0.5, 0.95, 0.99)] == [50.0, 95.0, 99.0]
    assert quantile([7.0], 0.5) == quantile([7.0], 0.99) == 7.0


def row(speed: float, p95: float, answered: int = 10, offered: float = 0.0) -> dict:
    return {"images_per_second": speed, "latency": {"p95": p95}, "requests": 10, "answered": answered,
            "offered": offered}  # fmt: skip


def test_what_a_system_holds_is_the_highest_measured_rate_within_the_bound():
    rows = [row(1.0, 1.0), row(2.0, 2.0), row(3.0, 4.0), row(4.0, 1.5, answered=9)]
    assert [held(rows, bound) for bound in (0.5, 1.9, 2.0, 3.9, 4.0)] == [None, 1.0, 2.0, 2.0, 3.0]


def test_why_no_higher_load_is_tried():
    assert why_stop(row(1.0, 1.0, offered=1.1), bound=2.0) is None
    assert why_stop(row(1.0, 3.0), bound=2.0) == "p95 above 2 s"
    assert why_stop(row(1.0, 1.0, answered=7), bound=2.0) == "3 of 10 requests refused or without an answer"
    assert why_stop(row(1.0, 1.0, offered=2.0), bound=2.0) == "less than 70% of the offered rate"


class Pipe:
    """Stands for a pipeline: notes its batches, and waits in the first of them until it is let go."""

    def __init__(self) -> None:
        self.batches, self.entered, self.go = [], threading.Event(), threading.Event()

    def __call__(self, labels, image_ids, seed):
        self.batches.append(list(image_ids))
        self.entered.set()
        assert self.go.wait(30.0)
        if 13 in image_ids:
            raise ValueError("13")
        ids = torch.tensor(image_ids)
        return SimpleNamespace(pixels=ids.numpy(), tokens=ids[:, None] + seed)


@pytest.mark.parametrize(("most", "batches"), [(1, [[0], [1], [2], [3], [4]]), (3, [[0], [1, 2, 3], [4]])])
def test_a_worker_takes_up_to_so_many_of_those_that_wait(most, batches):
    pipe = Pipe()
    system = Batches(pipe, seed=100, most=most)
    futures = [system.submit(Request(0, 0))]
    assert pipe.entered.wait(30.0)
    futures += [system.submit(Request(0, index)) for index in range(1, 5)]
    pipe.go.set()
    assert [int(future.result(30.0).tokens) for future in futures] == [100, 101, 102, 103, 104]
    assert [int(future.result().pixels) for future in futures] == [0, 1, 2, 3, 4]
    assert pipe.batches == batches
    system.close()


def test_a_worker_waits_for_more_and_answers_all_before_it_ends():
    pipe = Pipe()
    pipe.go.set()
    system = Batches(pipe, seed=0, most=2, wait=30.0)
    first, second = system.submit(Request(0, 1)), system.submit(Request(0, 2))
    assert int(first.result(30.0).tokens) == 1 and int(second.result(30.0).tokens) == 2
    assert pipe.batches == [[1, 2]]
    third = system.submit(Request(0, 3))
    system.close()
    assert int(third.result(0).tokens) == 3


def test_an_error_of_the_pipeline_is_everyones_in_the_batch():
    pipe = Pipe()
    pipe.go.set()
    system = Batches(pipe, seed=0, most=2, wait=30.0)
    futures = [system.submit(Request(0, index)) for index in (13, 14)]
    for future in futures:
        with pytest.raises(ValueError, match="13"):
            future.result(30.0)
    system.close()


def test_answers_of_two_systems_have_the_same_tokens_and_pixels_to_rounding():
    tokens, pixels, request = torch.arange(3), np.full((2, 2, 3), 7, np.uint8), Request(0, 0)
    same = Same()
    for system, level in (("a", 7), ("b", 7), ("c", 7 - LEVELS)):
        same.check(request, Answer(np.full_like(pixels, level), tokens.clone()), system)
    same.check(Request(0, 1), Answer(pixels, tokens), "a")
    assert same.summary() == {"compared": 2, "rounded": 1, "levels": LEVELS}
    with pytest.raises(AssertionError, match="c has other tokens than a"):
        same.check(request, Answer(pixels, tokens + 1), "c")
    with pytest.raises(AssertionError, match=f"b has pixels {LEVELS + 1} grey levels from those of a"):
        same.check(request, Answer(pixels + np.uint8(LEVELS + 1), tokens), "b")
