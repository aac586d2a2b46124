"""Samplers of the demo over many calls: windows under trial and remembered guesses change how long it takes alone."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.sampler import WINDOWS, Sampler
from alitok_fast.models import load_generator

SETTINGS = [
    {},
    {"temperature": 0.0},
    {"top_k": 40},
    {"top_p": 0.7, "temperature": 0.8},
    {"guidance_scale": 0.0},
    {"guidance_scale": 6.0, "guidance_power": 1.5},
]


@pytest.fixture(scope="module")
def demo() -> PackedGenerator:
    return PackedGenerator(load_generator("demo"))


@pytest.fixture(scope="module")
def images(demo) -> list[tuple[list[int], dict, torch.Tensor]]:
    """Labels, settings and tokens of calls with single images and batches of three, drawn token by token."""
    sampler, calls = Sampler(demo, window=1), []
    for index, settings in enumerate(SETTINGS):
        for batch in (1, 3, 1):
            labels, chosen = [(3 * index + i) % 10 for i in range(batch)], {"seed": 50 + index, **settings}
            calls.append((labels, chosen, sampler(labels, **chosen)))
    return calls


def check_report(sampler: Sampler, batch: int, length: int, prompt: int = 0) -> None:
    run = sampler.last_run
    if prompt == length:  # nothing is drawn
        assert (run.passes, run.tokens_per_pass, run.windows) == (0, 0, ())
        return
    assert run.tokens_per_pass * run.passes == pytest.approx(length)
    assert all(window in (WINDOWS if sampler.window is None else [sampler.window]) for window, _ in run.windows)
    assert all(passes > 0 for _, passes in run.windows)
    assert all(one[0] != two[0] for one, two in zip(run.windows, run.windows[1:], strict=False)), "one entry a stretch"
    total = sum(passes for _, passes in run.windows)
    assert total == run.passes if batch == 1 else run.passes <= total <= length


@pytest.mark.parametrize("window", [None, 2, 3, 8, 16])
def test_tokens_over_many_calls(demo, images, window):
    """All settings, batches of one and three in turn, with prompts, and with someone who watches every token."""
    sampler, length, used = Sampler(demo, window=window), demo.config.num_tokens, set()
    for begin in (0, 1):
        for index, (labels, settings, expected) in enumerate(images[begin::2]):
            assert torch.equal(sampler(labels, **settings), expected), (labels, settings)
            check_report(sampler, len(labels), length)
            used |= {one for one, _ in sampler.last_run.windows}
            prompt = expected[:, : [1, 5, 40, length - 1, length][index % 5]]
            assert torch.equal(sampler(labels, prompt_tokens=prompt, **settings), expected)
            check_report(sampler, len(labels), length, prompt.shape[1])
            seen = []
            observed = sampler(labels, on_step=lambda *given, seen=seen: seen.append(given), **settings)
            assert torch.equal(observed, expected)
            check_report(sampler, len(labels), length)
            assert [step for step, _ in seen] == list(range(length))
            assert all(torch.equal(part, expected[:, : step + 1]) for step, part in seen)
    assert used == {window} if window else {1, 2} <= used, "windows were tried"


def test_tokens_whatever_the_trials_find(demo, images, monkeypatch):
    """Clocks that run at random make every window look best now and then."""
    noise, now = random.Random(0), [0.0]

    def clock() -> float:
        now[0] += noise.choice([1e-4, 1e-3, 1e-1])
        return now[0]

    monkeypatch.setattr("alitok_fast.inference.loop.time.perf_counter", clock)
    sampler, used = Sampler(demo), set()
    for _ in range(2):
        for labels, settings, expected in images:
            assert torch.equal(sampler(labels, **settings), expected)
            check_report(sampler, len(labels), demo.config.num_tokens)
            used |= {one for one, _ in sampler.last_run.windows}
    assert len(used) >= 4, used


def test_remembered_images_save_passes(demo):
    sampler, settled, forgetful = Sampler(demo, window=8), [], []
    for image in range(30):
        sampler([image % 10], seed=image)
        settled.append(sampler.last_run.tokens_per_pass)
        fresh = Sampler(demo, window=8)
        fresh([image % 10], seed=image)
        forgetful.append(fresh.last_run.tokens_per_pass)
    assert settled[0] == forgetful[0]
    assert sum(settled[20:]) / 10 > 2.4 > sum(forgetful) / 30, (settled, forgetful)
    assert sum(settled[20:]) > 1.15 * sum(forgetful[20:]), "the same images"


def test_an_image_seen_before_is_guessed_rightly(demo):
    """Not only in the mean: the same image again takes as few passes as there can be."""
    sampler, passes = Sampler(demo, window=8), -(-demo.config.num_tokens // 8)
    first = sampler([4], seed=9)
    assert sampler.last_run.passes > 2 * passes
    assert torch.equal(sampler([4], seed=9), first)
    assert sampler.last_run.passes <= passes + 1
    assert not torch.equal(sampler([4], seed=10), first), "and what it guesses is no more than a guess"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("window", [None, 8])
def test_a_copy_has_forgotten_and_draws_the_same(demo, copied, window):
    sampler = Sampler(demo, window=window)
    for image in range(6):
        sampler([image], seed=image)
    fresh = Sampler(demo, window=window)
    expected = fresh([2], seed=2)
    twin = copied(sampler)
    assert (twin._guesses.guesses(torch.arange(10)) == -1).all() and not twin._choices and not twin._loops
    assert torch.equal(twin([2], seed=2), expected)
    if window:
        assert twin.last_run == fresh.last_run
        sampler([2], seed=2)
        assert sampler.last_run.passes < twin.last_run.passes, "the first one still knows that image"
    assert (sampler._guesses.guesses(torch.arange(10)) >= 0).all()


def test_guesses_of_one_batch_reach_another_size(demo):
    """What is remembered belongs to the sampler, not to the batch."""
    sampler = Sampler(demo, window=8)
    both = sampler([4, 7], seed=9)
    one = sampler([7], seed=9, image_ids=[1])
    assert torch.equal(one[0], both[1])
    assert sampler.last_run.tokens_per_pass > 4
