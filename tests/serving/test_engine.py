"""Engine: the images of `Pipeline`, whoever else asks; nothing is lost or answered twice, whatever goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ctypes
import gc
import os
import pickle
import random
import resource
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import CancelledError, wait
from dataclasses import replace

import numpy as np
import pytest
import torch

from alitok_fast import Pipeline, SamplingParams
from alitok_fast.models import Generator, Tokenizer
from alitok_fast.serving import Engine, EngineClosedError, QueueFullError
from alitok_fast.serving import engine as engine_module
from alitok_fast.serving import scheduler as scheduler_module
from alitok_fast.serving.stats import BUCKETS

LIMIT = 60  # seconds that nothing takes


@pytest.fixture(scope="module")
def engine(pipe, stage1):
    with Engine(pipe, stage1=stage1, max_queue=2000) as engine:
        engine.warm_up()
        yield engine


@pytest.fixture
def held(pipe, monkeypatch):
    """An engine whose passes wait until they are let go, so that tests see what is under way."""
    made = []

    def make(**options):
        engine = Engine(pipe, **options)
        gate, loop = threading.Event(), engine._scheduler._loop
        turn = loop.turn
        monkeypatch.setattr(loop, "turn", lambda: gate.wait(LIMIT) and turn())
        engine.let_go = gate.set
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.let_go()
        assert engine.close(drain=False)


def until(condition) -> None:
    ends = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


def accounted(stats) -> int:
    return sum(stats.requests.values())


# ---- images ----


def test_images_are_those_of_the_pipeline(engine, pipe):
    """Many at a time, with settings of their own each."""
    rng = random.Random(0)
    asked = [
        dict(
            label=rng.randrange(10),
            image_id=rng.randrange(50),
            seed=rng.randrange(3),
            guidance_scale=rng.choice([0, 2.0, None]),
            temperature=rng.choice([0, 0.8, 1.0]),
            top_k=rng.choice([None, 20]),
            top_p=rng.choice([None, 0.9]),
        )
        for _ in range(60)
    ]
    images = [future.result(LIMIT) for future in [engine.submit(**options) for options in asked]]
    for options, image in zip(asked, images, strict=True):
        label, image_id = options.pop("label"), options.pop("image_id")
        expected = pipe([label], image_ids=[image_id], **options)
        assert torch.equal(image.tokens, expected.tokens[0])
        assert np.array_equal(image.pixels, expected.pixels[0])
        assert (image.label, image.image_id, image.params.seed) == (label, image_id, options["seed"])
        assert 0 < image.passes <= pipe.generator.config.num_tokens
        assert image.image.size == (32, 32)


def test_completions_are_those_of_the_pipeline(engine, pipe):
    tokens = pipe(["bag"], seed=5).tokens[0]
    for given in (0, 1, 30, len(tokens)):
        image = engine.submit("coat", seed=1, prompt_tokens=tokens[:given]).result(LIMIT)
        expected = pipe(["coat"], seed=1, prompt_tokens=tokens[None, :given])
        assert torch.equal(image.tokens, expected.tokens[0]) and torch.equal(image.tokens[:given], tokens[:given])


def test_callers_in_threads_and_coroutines(engine, pipe):
    expected = pipe([3] * 24, seed=2).tokens
    found = {}

    def ask(first):
        for image_id in range(first, first + 4):
            found[image_id] = engine.submit(3, seed=2, image_id=image_id).result(LIMIT).tokens

    async def gather():
        return await asyncio.gather(*(engine.generate(3, seed=2, image_id=i) for i in range(12, 24)))

    threads = [threading.Thread(target=ask, args=(first,)) for first in (0, 4, 8)]
    for thread in threads:
        thread.start()
    found |= {image.image_id: image.tokens for image in asyncio.run(gather())}
    for thread in threads:
        thread.join(LIMIT)
    assert all(torch.equal(found[i], expected[i]) for i in range(24))


def test_rows_are_shown_while_an_image_grows(engine, pipe, stage1):
    """Each time more of them, as the causal decoder paints them; nothing after the image."""
    seen = []
    futures = [
        engine.submit(1, image_id=i, on_rows=lambda rows, pixels, i=i: seen.append((i, rows, pixels))) for i in range(4)
    ]
    images = [future.result(LIMIT) for future in futures]
    before = len(seen)
    assert before >= 2, "the first rows of several images"
    for i, image in enumerate(images):
        mine = [(rows, pixels) for j, rows, pixels in seen if i == j]
        assert [rows for rows, _ in mine] == sorted({rows for rows, _ in mine})
        for rows, pixels in mine:
            known = stage1.config.num_prefix_tokens + rows * stage1.config.grid
            painted = stage1.decode_rows(image.tokens[None, :known])[0]
            assert pixels.shape == (rows * stage1.config.patch_size, 32, 3)
            assert np.abs(pixels.astype(int) - (255 * painted.permute(1, 2, 0).numpy())).max() < 2
        assert (image.seconds_first_row is None) == (not mine)
    engine.submit(1).result(LIMIT)
    assert len(seen) == before


def test_who_shows_rows_badly_gets_the_image_all_the_same(engine, pipe, caplog):
    def on_rows(rows, pixels):
        raise KeyError("nobody there")

    images = [engine.submit(1, image_id=i, on_rows=on_rows) for i in range(4)]
    assert torch.equal(images[0].result(LIMIT).tokens, pipe([1]).tokens[0])
    assert "could not be painted or shown" in caplog.text


def test_calls_take_their_turn(engine):
    assert engine.call(lambda: threading.current_thread().name).result(LIMIT).startswith("alitok-")
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(LIMIT)
    begun, go = threading.Event(), threading.Event()
    first = engine.call(lambda: begun.set() or go.wait(LIMIT))
    assert begun.wait(LIMIT)
    second = engine.call(lambda: 1 / 0)
    assert second.cancel()
    go.set()
    assert first.result(LIMIT) and wait([second], LIMIT).done == {second}, "who waits is told"


@pytest.fixture
def beside(monkeypatch):
    """Engines as on a GPU: a thread of its own decodes and paints."""
    made = scheduler_module.Scheduler.__init__
    monkeypatch.setattr(
        scheduler_module.Scheduler, "__init__", lambda self, *given, beside: made(self, *given, beside=True)
    )


@pytest.mark.usefixtures("beside")
def test_a_thread_that_decodes_beside_the_passes(pipe, stage1):
    seen = Counter()
    with Engine(pipe, stage1=stage1) as engine:
        expected = pipe([i % 10 for i in range(60)])
        futures = [
            engine.submit(i % 10, image_id=i, on_rows=lambda rows, _, i=i: seen.update([(i, rows)])) for i in range(60)
        ]
        for future, tokens, pixels in zip(futures, expected.tokens, expected.pixels, strict=True):
            image = future.result(LIMIT)
            assert torch.equal(image.tokens, tokens) and np.array_equal(image.pixels, pixels)
        assert engine.call(lambda: threading.current_thread().name).result(LIMIT) == "alitok-finisher"
        assert seen and set(seen.values()) == {1}
        last = engine.submit(1)
    assert last.result(0).label == 1
    engine = Engine(pipe)
    futures = [engine.submit(1, image_id=i) for i in range(50)]
    assert engine.close(drain=False) and all(future.done() for future in futures)


@pytest.mark.device
def test_engine_on_cuda(cuda, pipe, stage1):
    """Alone an image is the pipeline's; beside others rounding may differ with the number of rows, and seldom shows."""
    on_gpu = copy.deepcopy(pipe)
    on_gpu = Pipeline(on_gpu.tokenizer.cuda(), on_gpu.generator.cuda())
    with Engine(on_gpu, stage1=copy.deepcopy(stage1).cuda(), max_images=8) as engine:
        engine.warm_up()
        assert torch.equal(engine.submit(3, seed=1).result(LIMIT).tokens, on_gpu([3], seed=1).tokens[0].cpu())
        seen = Counter()
        futures = [engine.submit(i % 10, image_id=i, on_rows=lambda rows, _: seen.update([rows])) for i in range(40)]
        expected = [on_gpu([i % 10], image_ids=[i]).tokens[0].cpu() for i in range(40)]
        same = [
            torch.equal(future.result(LIMIT).tokens, tokens) for future, tokens in zip(futures, expected, strict=True)
        ]
        assert sum(same) > 20 and seen
        prompt = expected[0][:30]
        assert torch.equal(engine.submit(1, prompt_tokens=prompt).result(LIMIT).tokens[:30], prompt)


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(label=[1, 2]), ValueError, "label: expected one class, got 2"),
        (dict(label="hat"), ValueError, "labels: expected a number in 0..9 or a class name"),
        (dict(label=10), ValueError, r"labels: expected values in \[0, 10\), got 10"),
        (dict(label=1, temperature=-1), ValueError, "temperature: expected 0 or a number"),
        (dict(label=1, colour=2), TypeError, "colour: expected one of the settings"),
        (dict(label=1, image_id=0.5), TypeError, "image_id: expected an integer"),
        (dict(label=1, timeout=0), ValueError, "timeout: expected a number above 0, got 0"),
        (dict(label=1, prompt_tokens=torch.zeros(99, dtype=torch.int64)), ValueError, "prompt_tokens: expected shape"),
        (dict(label=1, prompt_tokens=torch.zeros(3)), TypeError, "prompt_tokens: expected int64"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(arguments, error, message, engine):
    before = accounted(engine.stats())
    with pytest.raises(error, match=message):
        engine.submit(**arguments)
    assert accounted(engine.stats()) == before


def test_bad_engines_are_refused(pipe):
    for options, message in (
        (dict(max_images=0), "max_images: expected a number in"),
        (dict(max_queue=0), "max_queue: expected a number in"),
        (dict(timeout=-1.0), "timeout: expected a number above 0"),
        (dict(window=17), "window: expected a number in"),
        (dict(stage1=pipe.tokenizer), "stage1: expected a causal decoder"),
        (dict(turn_seconds=0), "turn_seconds: expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(pipe, **options)
    with Engine(pipe) as engine, pytest.raises(ValueError, match="on_rows: expected an engine with a causal tokenizer"):
        engine.submit(1, on_rows=print)
    training = copy.deepcopy(pipe)
    training.generator.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        Engine(training)


def test_an_engine_belongs_to_its_process(engine):
    with pytest.raises(TypeError, match="it belongs to its process"):
        pickle.dumps(engine)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a process with threads is forked
def test_a_forked_process_has_no_engine(engine):
    reading, writing = os.pipe()
    if not (child := os.fork()):
        said = str(engine.alive)
        for ask in (lambda: engine.submit(1), lambda: engine.call(int)):
            with contextlib.suppress(EngineClosedError):
                ask()
                said = "it was asked"
        os.write(writing, f"{said} {engine.close()}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"False True"
    os.close(reading), os.close(writing)
    assert engine.submit(1).result(LIMIT).label == 1


# ---- memory ----


def test_memory_decides_how_many(pipe, monkeypatch, caplog):
    class Plan:
        largest_batch = 3

    monkeypatch.setattr(engine_module, "plan_slots", lambda *_, **__: Plan)
    with Engine(pipe) as engine:
        assert engine.max_images == 3 and "memory is short: 3 images are sampled at a time instead of 8" in caplog.text
        images = [engine.submit(i % 10, image_id=i) for i in range(9)]
        assert {image.result(LIMIT).image_id for image in images} == set(range(9))
        assert engine.stats().sequences == 6
    with pytest.raises(MemoryError, match="max_images: expected at most the 3 that fit in memory, got 4"):
        Engine(pipe, max_images=4)
    Plan.largest_batch = 0
    with pytest.raises(MemoryError, match="max_images: expected memory for at least one image"):
        Engine(pipe)


def test_memory_that_runs_out_while_decoding(pipe):
    """A batch that cannot be decoded is decoded one by one; an image that cannot be is its request's error alone."""
    with Engine(pipe, window=1) as engine:
        finisher = engine._scheduler._finisher
        decode, refused = finisher._images_of, []

        def short(tokens):
            if len(tokens) > 1 or len(refused) < 1:
                refused.append(len(tokens))
                raise MemoryError("expected memory for images, got none")
            return decode(tokens)

        finisher._images_of = short
        futures = [engine.submit(i, image_id=i) for i in range(8)]
        wait(futures, LIMIT)
        failed = [future for future in futures if future.exception()]
        assert all(isinstance(future.exception(), MemoryError) for future in failed) and len(failed) <= 1
        assert max(refused) > 1, "several were finished at the same time"
        until(lambda: accounted(engine.stats()) == 8)


# ---- queue, cancelling, time ----


def test_the_queue_has_an_end(held):
    engine = held(max_images=1, max_queue=3)
    first = engine.submit(0)
    until(lambda: engine.stats().running == 1)
    others = [engine.submit(i) for i in range(1, 4)]  # nobody who joins at once counts as one that waits
    with pytest.raises(QueueFullError, match="queue: expected fewer than 3 images that wait"):
        engine.submit(4)
    with pytest.raises(QueueFullError):
        engine.call(lambda: None)
    assert engine.stats().queue_length == 3
    engine.let_go()
    assert {future.result(LIMIT).label for future in [first, *others]} == {0, 1, 2, 3}
    until(lambda: engine.stats().requests == dict(finished=4, failed=0, cancelled=0, timed_out=0, rejected=2))


def test_a_thousand_are_cancelled(held, pipe):
    """Those that wait, those that run; the rest get their images, and all sequences are free again."""
    engine = held(max_queue=1100)
    futures = [engine.submit(i % 10, image_id=i) for i in range(1050)]
    until(lambda: engine.stats().running == 8)
    kept = set(range(2, 1050, 21))
    answers = Counter()
    for i, future in enumerate(futures):
        future.add_done_callback(lambda _, i=i: answers.update([i]))
    cancelled = [future for i, future in enumerate(futures) if i not in kept]
    assert len(cancelled) == 1000 and all(future.cancel() for future in cancelled)
    assert engine.stats().queue_length == len([i for i in kept if i >= 8])
    engine.let_go()
    for i in sorted(kept):
        assert torch.equal(futures[i].result(LIMIT).tokens, pipe([i % 10], image_ids=[i]).tokens[0])
    for future in cancelled:
        with pytest.raises(CancelledError):
            future.result(0)
    until(lambda: engine.stats().sequences_in_use == 0)
    assert answers == Counter(range(1050)), "each was answered once"
    until(lambda: engine.stats().requests == dict(finished=50, failed=0, cancelled=1000, timed_out=0, rejected=0))


def test_a_cancelled_coroutine_cancels_its_request(held):
    engine = held()

    async def give_up():
        task = asyncio.ensure_future(engine.generate(1))
        await asyncio.to_thread(until, lambda: engine.stats().running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    engine.let_go()
    until(lambda: engine.stats().requests["cancelled"] == 1)
    assert engine.stats().sequences_in_use == 0


def test_requests_time_out(held):
    """In the queue and while they run; the others do not."""
    engine = held(max_images=1, timeout=LIMIT)
    runs, waits, stays = engine.submit(0, timeout=0.05), engine.submit(1, timeout=0.05), engine.submit(2)
    until(lambda: engine.stats().running == 1)
    time.sleep(0.06)
    engine.let_go()
    for future in (runs, waits):
        with pytest.raises(TimeoutError, match="timeout: expected an image within 0.05 s, got none"):
            future.result(LIMIT)
    assert stays.result(LIMIT).label == 2
    until(lambda: engine.stats().requests == dict(finished=1, failed=0, cancelled=0, timed_out=2, rejected=0))


@pytest.mark.usefixtures("beside")
def test_an_image_that_waits_too_long_to_be_decoded_times_out(pipe):
    with Engine(pipe) as engine:
        hold, held = threading.Event(), threading.Event()
        blocks = engine.call(lambda: (held.set(), hold.wait(LIMIT)))
        assert held.wait(LIMIT)
        late, stays = engine.submit(1, timeout=0.5), engine.submit(2)
        until(lambda: engine._scheduler._finisher.waiting == 3 or late.done())  # both are sampled
        time.sleep(0.5)
        hold.set()
        with pytest.raises(TimeoutError, match="timeout: expected an image within 0.5 s"):
            late.result(LIMIT)
        assert stays.result(LIMIT).label == 2 and blocks.result(LIMIT)
        assert engine.stats().requests["timed_out"] == 1


# ---- faults ----


def poisoned(pipe, what):
    """A copy of the pipeline in which one class has no logits, or one code no pixels."""
    sick = copy.deepcopy(pipe)
    with torch.no_grad():
        if what == "class":
            sick.generator.embeddings.weight[sick.generator.condition_ids(torch.tensor([4]), 1)] = torch.nan
        else:
            sick.tokenizer.quantize.embedding.weight[0] = torch.nan
    return Pipeline(sick.tokenizer, sick.generator)


def test_a_poisoned_image_among_good_ones(pipe):
    """NaN in the logits of one class: its requests fail, and what takes their sequences afterwards is well."""
    with Engine(poisoned(pipe, "class"), max_images=2) as engine:
        futures = [engine.submit(label, image_id=i) for i, label in enumerate((1, 4, 2, 4, 4, 3, 1))]
        for i, (future, label) in enumerate(zip(futures, (1, 4, 2, 4, 4, 3, 1), strict=True)):
            if label == 4:
                with pytest.raises(RuntimeError, match="sampling: expected finite logits, got NaN or infinity at st"):
                    future.result(LIMIT)
            else:
                assert torch.equal(future.result(LIMIT).tokens, pipe([label], image_ids=[i]).tokens[0])
        until(lambda: engine.stats().requests["failed"] == 3)
        assert engine.alive


def test_a_poisoned_code_among_good_ones(pipe):
    """NaN in the decoder: the images that hold the code fail, those that are decoded with them do not."""
    with Engine(poisoned(pipe, "code"), window=1) as engine:
        holds = [bool((pipe([1], image_ids=[i]).tokens == 0).any()) for i in range(12)]
        tokens = pipe([1]).tokens[0]
        sick = torch.where(torch.arange(len(tokens)) == 30, 0, tokens)
        futures = [engine.submit(1, image_id=i) for i in range(12)]
        futures.insert(5, engine.submit(1, prompt_tokens=sick))
        holds.insert(5, True)
        wait(futures, LIMIT)
        assert [future.exception() is not None for future in futures] == holds
        with pytest.raises(RuntimeError, match="images: expected finite pixels, got NaN"):
            futures[5].result()


def test_a_pass_that_fails_is_told_to_all_and_survived(pipe, caplog):
    with Engine(pipe, window=1) as engine:
        loop, left = engine._scheduler._loop, [2]
        turn = loop.turn

        def failing():
            if left[0]:
                left[0] -= 1
                raise RuntimeError("the device has lost its mind")
            return turn()

        loop.turn = failing
        for _ in range(2):
            with pytest.raises(RuntimeError, match="lost its mind"):
                engine.submit(1).result(LIMIT)
        assert engine.submit(1).result(LIMIT).label == 1 and engine.alive
        left[0] = 10
        for _ in range(3):
            with pytest.raises(RuntimeError, match="lost its mind"):
                engine.submit(1).result(LIMIT)
        until(lambda: not engine.alive)
        with pytest.raises(EngineClosedError, match="it failed 3 times, one after the other"):
            engine.submit(1)
    assert "a pass failed; 1 requests end with the error" in caplog.text


@pytest.mark.parametrize("part", ["remembering", "leaving", "leaving late"])
def test_whatever_fails_the_image_is_answered(part, pipe, caplog):
    def fail(*_):
        raise RuntimeError("the device is gone")

    with Engine(pipe) as engine:
        engine.warm_up()
        scheduler = engine._scheduler
        if part == "remembering":
            scheduler._guesses.remember = fail
        else:
            scheduler._loop.leave = fail
        turn = scheduler._loop.turn
        if part == "leaving late":
            scheduler._loop.turn = lambda: time.sleep(0.02) or 0  # no pass, so that its time is up
        future = engine.submit(1, timeout=0.1 if part == "leaving late" else None)
        with pytest.raises((RuntimeError, TimeoutError), match="the device is gone|timeout: expected an image"):
            future.result(LIMIT)
        scheduler._loop.turn = turn
        until(lambda: not scheduler._running)
        assert engine.alive == (part == "remembering")
        until(lambda: engine.stats().requests["failed" if part != "leaving late" else "timed_out"] == 1)


def test_callbacks_that_raise_what_is_no_exception(pipe, stage1, caplog):
    """The threads work for all, and go on."""

    def bad(*_):
        raise asyncio.CancelledError

    with Engine(pipe, stage1=stage1, max_images=1) as engine:
        futures = [engine.submit(1, image_id=i, on_rows=bad) for i in range(3)] + [engine.call(int)]
        for future in futures:
            future.add_done_callback(bad)
        for future in futures:
            future.result(LIMIT)
        assert engine.submit(1).result(LIMIT).label == 1 and engine.alive
        begun, go = threading.Event(), threading.Event()
        blocks = engine.call(lambda: begun.set() or go.wait(LIMIT))
        assert begun.wait(LIMIT)
        waiting = [engine.submit(1, image_id=i) for i in range(5)] + [engine.call(int)]
        for future in waiting:
            with contextlib.suppress(asyncio.CancelledError):
                future.add_done_callback(bad)
        closing = threading.Thread(target=engine.close, args=(False,))
        closing.start()
        until(lambda: not engine.alive)
        go.set()
        closing.join(LIMIT)
        assert blocks.result(LIMIT) is True
        for future in waiting:
            with pytest.raises(EngineClosedError):
                future.result(LIMIT)
    assert "a callback of a future failed" in caplog.text


def test_a_request_that_comes_as_the_engine_falls_asleep(pipe, monkeypatch):
    """Between the end of a wait and the lock: here somebody holds the lock that long."""
    monkeypatch.setattr(scheduler_module, "IDLE_SECONDS", 0.2)
    with Engine(pipe) as engine:
        engine.warm_up()
        for _ in range(2):
            with engine._scheduler._wake:
                time.sleep(0.5)
                future = engine.submit(1)
            assert future.result(LIMIT).label == 1


def test_a_device_that_stays_broken(pipe):
    """Nothing works any more, to leave neither: everyone is told, and the end comes."""
    engine = Engine(pipe, max_images=1)
    loop = engine._scheduler._loop

    def fail(*_):
        raise RuntimeError("the device is gone")

    loop.turn = loop.leave = fail
    futures = [engine.submit(1), engine.submit(2)]
    for future in futures:
        assert isinstance(future.exception(LIMIT), RuntimeError)
    until(lambda: not engine.alive)
    assert engine.close()


@pytest.mark.parametrize("part", ["join", "decode"])
def test_an_engine_that_always_fails_is_not_alive(part, pipe):
    engine = Engine(pipe)
    scheduler = engine._scheduler

    def fail(*_):
        raise RuntimeError("no memory on the device")

    if part == "join":
        scheduler._loop.join = fail
    else:
        scheduler._finisher._images_of = fail
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no memory on the device"):
            engine.submit(1).result(LIMIT)
    until(lambda: not engine.alive)
    assert engine.close()


@pytest.mark.usefixtures("beside")
def test_the_thread_that_decodes_ends(pipe):
    engine = Engine(pipe)
    finisher = engine._scheduler._finisher

    def end(*_):
        raise SystemExit("out")

    finisher._images_of = end
    future = engine.submit(1)
    assert isinstance(future.exception(LIMIT), RuntimeError | SystemExit)
    until(lambda: not engine.alive)
    with pytest.raises(EngineClosedError):
        engine.submit(1)
    assert engine.close()


def test_kept_futures_do_not_keep_the_cache(pipe):
    engine = Engine(pipe)
    future, call, cache = engine.submit(1), engine.call(int), weakref.ref(engine._scheduler._loop)
    future.result(LIMIT), call.result(LIMIT)
    engine.close()
    del engine
    gc.collect()
    assert cache() is None and future.result().label == 1


def test_an_image_goes_with_its_future(pipe):
    """At once, not when the collector of cycles comes by."""
    with Engine(pipe) as engine:
        gc.collect()
        gc.disable()
        try:
            future = engine.submit(1)
            image = weakref.ref(future.result(LIMIT))
            del future
            until(lambda: image() is None)
        finally:
            gc.enable()


def test_what_the_caller_writes_later_is_not_of_the_prompt(held, pipe):
    prompt = pipe([1]).tokens[0, :40]
    engine = held()
    future, expected = engine.submit(1, prompt_tokens=prompt, image_id=5), prompt.clone()
    prompt.zero_()
    engine.let_go()
    assert torch.equal(future.result(LIMIT).tokens[:40], expected)


def test_weights_that_changed_before_count(pipe):
    changed = copy.deepcopy(pipe)
    changed = Pipeline(changed.tokenizer, changed.generator, decode_dtype=torch.bfloat16)
    changed([1])
    with torch.no_grad():
        for weight in changed.tokenizer.decoder.parameters():
            weight.mul_(1.05)
    with Engine(changed) as engine:
        pixels = engine.submit(1).result(LIMIT).pixels
    assert np.array_equal(pixels, changed([1]).pixels[0])


def test_nobody_waits_for_an_engine_that_broke(pipe, caplog):
    """Whatever its thread ends with, everyone is told."""
    engine = Engine(pipe, max_images=1)
    engine._scheduler._drop = lambda: 1 / 0
    error = engine.submit(1).exception(LIMIT)
    assert isinstance(error, EngineClosedError) and "it ended with an error (division by zero)" in str(error)
    until(lambda: not engine.alive)
    with pytest.raises(EngineClosedError, match="division by zero"):
        engine.submit(1)
    assert engine.close() and "the engine ended" in caplog.text


# ---- the end ----


def test_closing_finishes_what_is_there(pipe):
    engine = Engine(pipe, max_images=2)
    futures = [engine.submit(i % 10, image_id=i) for i in range(20)]
    assert engine.close() and engine.close()
    assert [future.result(0).image_id for future in futures] == list(range(20))
    with pytest.raises(EngineClosedError, match="it was closed"):
        engine.submit(1)
    assert not engine.alive


def test_closing_at_once_answers_all_with_an_error(held):
    engine = held(max_images=2)
    futures = [engine.submit(1, image_id=i) for i in range(10)]
    calls = [engine.call(lambda: 1)]
    until(lambda: engine.stats().running == 2)
    engine.let_go()
    assert engine.close(drain=False)
    errors = [future.exception(LIMIT) for future in futures]
    assert sum(isinstance(error, EngineClosedError) for error in errors) >= 8
    assert all(future.done() for future in calls) and engine.stats().sequences_in_use == 0


def test_an_engine_that_nobody_holds_ends(pipe):
    engine = Engine(pipe)
    thread, gone = engine._scheduler._threads[0], weakref.ref(engine)
    future = engine.submit(1)
    future.result(LIMIT)
    del engine
    gc.collect()
    assert gone() is None
    thread.join(LIMIT)
    assert not thread.is_alive()


# ---- numbers ----


def test_stats(pipe):
    with Engine(pipe) as engine:
        for future in [engine.submit(i % 10, image_id=i) for i in range(20)]:
            future.result(LIMIT)
        until(lambda: accounted(engine.stats()) == 20)
        stats = engine.stats()
        length = pipe.generator.config.num_tokens
        assert stats.requests["finished"] == 20 and stats.tokens == 20 * length
        assert 0 < stats.passes <= stats.image_passes <= 20 * length and stats.busy_seconds > 0
        assert (stats.queue_length, stats.running, stats.sequences) == (0, 0, 16)
        for kind in ("queued", "image"):
            latency = stats.latency[kind]
            assert set(latency.quantiles) == {0.5, 0.95, 0.99} and latency.counts[-1] == 20
            assert list(latency.counts) == sorted(latency.counts) and len(latency.counts) == len(BUCKETS) + 1
            assert latency.quantiles[0.5] <= latency.quantiles[0.99] <= latency.total
        assert stats.latency["first_row"].quantiles == {}


@pytest.fixture(scope="module")
def narrow(pipe, stage1):
    """The demo's pictures and tokens, from networks of random weights that take a tenth of the time."""
    widths = dict(
        encoder_width=32, encoder_layers=1, encoder_heads=2, decoder_width=32, decoder_layers=1, decoder_heads=2
    )
    tokenizer, first = (Tokenizer(replace(model.config, **widths)).eval() for model in (pipe.tokenizer, stage1))
    first.quantize.embedding.load_state_dict(tokenizer.quantize.embedding.state_dict())
    generator = Generator(replace(pipe.generator.config, width=32, num_layers=2, num_heads=2)).eval()
    return Pipeline(tokenizer, generator), first


@pytest.mark.slow
def test_ten_thousand_requests_do_not_grow(narrow):
    """Of all kinds: finished, cancelled, timed out, watched. The process keeps its size."""
    pipe, stage1 = narrow
    rng, counts = random.Random(1), Counter()

    def ask(engine, number):
        kind = rng.choice(["plain"] * 6 + ["cancel", "late", "watch", "complete"])
        options = dict(image_id=number, seed=number % 7)
        if kind == "late":
            options["timeout"] = 1e-6
        if kind == "watch":
            options["on_rows"] = lambda rows, pixels: None
        if kind == "complete":
            options["prompt_tokens"] = torch.zeros(60, dtype=torch.int64)
        future = engine.submit(number % 10, SamplingParams(guidance_scale=rng.choice([0, 0, 2])), **options)
        if kind == "cancel":
            future.cancel()
        return future

    with Engine(pipe, stage1=stage1, window=1) as engine:
        sizes = []
        for part in range(10):
            for _ in range(10):
                futures = [ask(engine, part) for _ in range(100)]
                wait(futures, LIMIT)
                counts.update("cancelled" if f.cancelled() else type(f.exception()).__name__ for f in futures)
            sizes.append(_resident())
        assert sum(counts.values()) == 10_000 and counts["NoneType"] > 6000 and counts["cancelled"] > 500
        until(lambda: accounted(engine.stats()) == 10_000)
        stats = engine.stats()
        assert stats.sequences_in_use == 0 and stats.queue_length == 0
        assert stats.requests["finished"] == counts["NoneType"]
        assert engine._scheduler._finisher._rows == {} and not engine._scheduler._running
    assert sizes[-1] - sizes[2] < 16 << 20, [size >> 20 for size in sizes]


def _resident() -> int:
    """Bytes of this process that are in use, not those which the allocator keeps after they were freed."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # of glibc
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
