"""SlotLoop: whatever joins, leaves and runs beside it, an image is the one that `Sampler` gives."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

import alitok_fast.inference.memory as memory_module
from alitok_fast import Sampler, SamplingParams, load_generator, prepare, use_reference
from alitok_fast.config import generator_preset
from alitok_fast.inference.memory import plan, row_bytes
from alitok_fast.inference.sampler import guidance_schedule
from alitok_fast.inference.slots import SlotLoop, plan_slots
from alitok_fast.models import Generator


@pytest.fixture(scope="module")
def gen():
    return load_generator("demo")


def schedule_of(params, config):
    if not params.guided:
        return None
    return guidance_schedule(config.num_tokens, params.guidance_scale, params.guidance_power)


def some_requests(config, count, seed):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        params = SamplingParams(
            guidance_scale=rng.choice([0, 1, 3.0]),
            temperature=rng.choice([0, 1, 0.7]),
            top_k=rng.choice([None, 5]),
            top_p=rng.choice([None, 0.8]),
            seed=rng.randrange(5),
        ).resolved(config)
        given = rng.choice([0, 0, 0, 5, 40, config.num_tokens])
        prompt = torch.randint(config.codebook_size, (given,), generator=torch.Generator().manual_seed(given))
        found.append((rng.randrange(config.num_classes), params, rng.randrange(100), prompt if given else None))
    return found


def run_all(loop, requests, rng):
    """Tokens by number; some are left out on the way, as where a client has gone: a quarter, however long turns are."""
    config, waiting, running, done = loop.model.config, list(enumerate(requests)), {}, {}
    leaves = {number: rng.randrange(config.num_tokens) for number in range(len(requests)) if rng.random() < 0.25}
    while waiting or running:
        while waiting and loop.has_room(waiting[0][1][1].guided) and rng.random() < 0.6:
            number, (label, params, image_id, prompt) = waiting.pop(0)
            slot = loop.join(label, schedule_of(params, config), params, image_id, prompt)
            running[slot] = number
        loop.turn()
        for slot in list(running):
            if slot.known == config.num_tokens:
                done[running.pop(slot)] = loop.tokens(slot)
                loop.leave(slot)
            elif slot.known > leaves.get(running[slot], config.num_tokens):
                del running[slot]
                loop.leave(slot)
    return done


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("windows", [(1,), (3,), (1, 2, 3, 4, 6, 8)], ids=str)
def test_an_image_is_that_of_the_sampler(windows, weight_dtype, gen):
    model = prepare(gen, weight_dtype)
    requests = some_requests(model.config, 40, seed=len(windows))
    loop = SlotLoop(model, 9, windows=windows, seconds=0.001)
    done = run_all(loop, requests, random.Random(len(windows)))
    assert len(done) > 20 and loop.sequences_in_use == 0
    sampler = Sampler(model)
    for number, tokens in done.items():
        label, params, image_id, prompt = requests[number]
        given = None if prompt is None else prompt[None]
        assert torch.equal(tokens, sampler([label], params, image_ids=[image_id], prompt_tokens=given)[0])


def test_a_generator_that_steps_by_itself(gen):
    """The path of a GPU, on a CPU: prompts are read by `read_prompt`, sizes change under running images."""
    config = gen.config
    requests = some_requests(config, 9, seed=7)
    with use_reference():
        model = prepare(gen)
        assert isinstance(model, Generator)
        loop = SlotLoop(model, 7, seconds=0.05)
        loop._sizes = [1, 2, 4, 7]  # as on a GPU
        loop._state, loop._slots = loop._state_of(1), [None]
        done = run_all(loop, requests, random.Random(3))
        assert set(loop._states) >= {1, 4}
        sampler = Sampler(model)
        assert len(done) > 4
        for number, tokens in done.items():
            label, params, image_id, prompt = requests[number]
            given = None if prompt is None else prompt[None]
            assert torch.equal(tokens, sampler([label], params, image_ids=[image_id], prompt_tokens=given)[0])


def test_sequences_are_counted(gen):
    """Two of the cache for an image with guidance, one without; those of a failed beginning come back."""
    loop = SlotLoop(prepare(gen), 3)
    guided, plain = (SamplingParams(guidance_scale=scale).resolved(gen.config) for scale in (2, 0))
    first = loop.join(1, schedule_of(guided, gen.config), guided, 0)
    assert loop.sequences_in_use == 2 and loop.has_room(False) and not loop.has_room(True)
    second = loop.join(1, None, plain, 0)
    assert len(first.sequences) == 2 and len(second.sequences) == 1 and not loop.has_room(False)
    loop.leave(first)
    with pytest.raises(ValueError, match="labels"):
        loop.join(10_000, schedule_of(guided, gen.config), guided, 0)
    assert loop.sequences_in_use == 1 and loop.active == [second]
    assert loop.tokens(second).shape == (0,)


def test_a_turn_ends_with_the_first_image(gen):
    loop = SlotLoop(prepare(gen), 4, seconds=10)
    params = SamplingParams(guidance_scale=0).resolved(gen.config)
    length = gen.config.num_tokens
    slots = [loop.join(1, None, params, 0, torch.zeros(given, dtype=torch.int64)) for given in (length - 4, 1)]
    while not loop.turn() or slots[0].known < length:
        pass
    assert slots[1].known < length
    assert loop.passes(slots[0]) >= 4


def test_a_cache_that_does_not_fit():
    gen = Generator(generator_preset("demo"))
    with pytest.raises(MemoryError, match="sequences: expected a cache that fits in memory, got 1000000000000 seq"):
        SlotLoop(prepare(gen.eval()), 10**12)


def test_the_plan_counts_what_a_loop_takes(gen, monkeypatch):
    """On a CPU what a batch takes; on a GPU also the rows that could be images without guidance, and the graphs'."""
    of_batch = plan(gen)
    assert plan_slots(gen).bytes_per_image == of_batch.bytes_per_image
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: 10**9)
    monkeypatch.setattr(type(gen), "device", SimpleNamespace(type="cuda"))
    for windows, rows in (((1,), 12), ((1, 4), 24)):
        more = plan_slots(gen, windows=windows).bytes_per_image - of_batch.bytes_per_image
        assert more == (rows - 2) * row_bytes(gen.config)
