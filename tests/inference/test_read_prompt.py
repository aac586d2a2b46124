"""read_prompt of models that step on their own: in a few passes, what token by token would leave behind."""

from __future__ import annotations

import pytest
import torch
from test_sampler import sample_uncached

from alitok_fast._library import use_reference
from alitok_fast.inference.loop import SamplingLoop
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.inference.sampler import Sampler, guidance_schedule
from alitok_fast.inference.state import MOST_COLUMNS
from alitok_fast.models import Generator, generator

LENGTH = 21  # of the tiny generator's sequences
PROMPTS = [1, 4, LENGTH - 1, LENGTH]
KINDS = pytest.mark.parametrize("kind", [None, torch.int8], ids=["generator", "int8"])
GUIDED = pytest.mark.parametrize("guided", [False, True])


@pytest.fixture
def steps(monkeypatch) -> list[tuple[int, int]]:
    """The shapes of the ids of all calls of `step`."""
    shapes, step = [], Generator.step
    monkeypatch.setattr(Generator, "step", lambda *given: shapes.append(tuple(given[1].shape)) or step(*given))
    return shapes


def model_of(gen: Generator, kind: torch.dtype | None):
    return gen if kind is None else QuantizedGenerator(gen, kind)


def tokens_of(batch: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(32, (batch, length), generator=torch.Generator().manual_seed(length))


def arguments_of(batch: int, guided: bool, prompt: torch.Tensor | None, device=None) -> tuple:
    """Of `SamplingLoop.start`, but for the guesses."""
    schedule = guidance_schedule(LENGTH, 4.0, 1.2) if guided else None
    given = torch.arange(batch) % 10, schedule, SamplingParams(seed=7), torch.arange(batch) + 5, prompt
    return tuple(one.to(device) if isinstance(one, torch.Tensor) else one for one in given)


def passes_of(length: int, rows: int, inputs: int = 256) -> int:
    return -(-length // max(1, inputs // rows)) if length < LENGTH else 0


@KINDS
@GUIDED
@pytest.mark.parametrize("length", PROMPTS)
@pytest.mark.parametrize("inputs", [256, 14, 1])  # of a pass: 14 are 7, 4 or 2 of each row
@torch.no_grad()
def test_leaves_behind_what_single_tokens_do(device, tiny_generator, monkeypatch, steps, kind, guided, length, inputs):
    monkeypatch.setattr(generator, "PROMPT_INPUTS", inputs)
    model, batch = model_of(tiny_generator().to(device), kind), 3
    rows, guesses = batch * (2 if guided else 1), tokens_of(batch, LENGTH).to(device)
    given = arguments_of(batch, guided, tokens_of(batch, length), device)
    read, fed = (SamplingLoop(model, batch, guided) for _ in range(2))
    read.start(*given, guesses)
    assert len(steps) == passes_of(length, rows, inputs)
    assert read.state.passes.tolist() == [len(steps)] * batch
    assert all(shape[0] == rows and shape[0] * shape[1] <= max(inputs, rows) for shape in steps)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "read_prompt", lambda *_: 0)
        fed.start(*given, guesses)
    for _ in range(length):
        fed.do_pass()
    assert torch.equal(read.state.tokens, fed.state.tokens)
    assert torch.equal(read.state.positions, fed.state.positions)
    assert read.state.positions.tolist() == [length if length < LENGTH else -1] * rows
    if length < LENGTH:  # else nobody needs the rest
        assert torch.equal(read.state.ids[:, 0], fed.state.ids[:, 0])
        for name in ("keys", "values"):
            got, expected = getattr(read.cache, name), getattr(fed.cache, name)
            torch.testing.assert_close(got[:, :, :, :length], expected[:, :, :, :length], rtol=1e-3, atol=1e-4)
            assert got[:, :, :, 1:length].any(-1).all() and not got[:, :, :, length:].any(), "nothing else is written"


@GUIDED
@pytest.mark.parametrize("length", [1, 4, 12, LENGTH - 2, LENGTH - 1])
@torch.no_grad()
def test_feeds_next_what_the_native_call_does(tiny_generator, guided, length):
    """The prompt's last token and the guesses behind it; where there is none, the token before again."""
    gen, batch = tiny_generator(), 4
    guesses = tokens_of(batch, LENGTH)
    guesses[1] = -1
    guesses[2, ::3] = -1
    guesses[3, 1::2] = torch.tensor([32, -7, 2**62, 100, 32, -1, 45, 2**63 - 1, -(2**63), 32])
    given = arguments_of(batch, guided, tokens_of(batch, length))
    read, native = SamplingLoop(gen, batch, guided), SamplingLoop(PackedGenerator(gen), batch, guided)
    for loop in (read, native):
        loop.start(*given, guesses.where((guesses >= -1) & (guesses < 32), -1))
        loop.state.tokens[:, length:] = guesses[:, length:]
    read.start(*given)
    # Again, this time with what stands in `tokens` now.
    read.state.tokens[:, length:] = guesses[:, length:]
    read.state.ids.copy_(native.state.ids)
    read.state.positions.zero_()
    gen.read_prompt(read.state, read.cache, length)
    native.advance(1, MOST_COLUMNS)
    assert torch.equal(read.state.positions, native.state.positions)
    behind = min(MOST_COLUMNS, LENGTH - length + 1)
    assert torch.equal(read.state.ids[:, :behind], native.state.ids[:, :behind])


@pytest.mark.parametrize("scale", [0.0, 4.0])
@pytest.mark.parametrize("length", PROMPTS)
def test_tokens_equal_the_uncached_definition(tiny_generator, monkeypatch, scale, length):
    gen, labels, settings = tiny_generator(), [1, 2, 9], {"seed": 3, "top_k": 20}
    expected = sample_uncached(gen, labels, scale, 1.4, **settings)
    packed = Sampler(gen)(
        labels, prompt_tokens=expected[:, :length], guidance_scale=scale, guidance_power=1.4, **settings
    )
    assert torch.equal(packed, expected)
    with use_reference():
        for inputs in (256, 20, 1):
            monkeypatch.setattr(generator, "PROMPT_INPUTS", inputs)
            for window in (1, 5):
                sampler = Sampler(gen, window=window)
                assert sampler.model is gen
                for _ in range(2):
                    prompt = expected[:, :length]
                    tokens = sampler(labels, prompt_tokens=prompt, guidance_scale=scale, guidance_power=1.4, **settings)
                    assert torch.equal(tokens, expected)


@KINDS
@pytest.mark.parametrize("length", PROMPTS)
def test_a_prompt_that_is_not_the_models_own(tiny_generator, monkeypatch, kind, length):
    """What follows depends on it, and is what follows it read token by token."""
    model = model_of(tiny_generator(), kind)
    settings = {"prompt_tokens": tokens_of(3, length), "seed": 5, "guidance_scale": 3.0}
    with use_reference(kind is None):
        got = Sampler(model)([1, 2, 9], **settings)
        monkeypatch.setattr(type(model), "read_prompt", lambda *_: 0)
        expected = Sampler(model)([1, 2, 9], **settings)
    assert torch.equal(got, expected)
    assert torch.equal(got[:, :length], settings["prompt_tokens"])


@pytest.mark.parametrize("kind", ["packed", "generator", "int8"])
@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.parametrize("length", [0, *PROMPTS])
def test_every_step_is_reported_once(tiny_generator, kind, window, length):
    """In order, those of the prompt too, and of a prompt that leaves nothing to draw."""
    gen, seen = tiny_generator(), []
    prompt = tokens_of(2, length)
    with use_reference(kind == "generator"):
        model = PackedGenerator(gen) if kind == "packed" else model_of(gen, torch.int8 if kind == "int8" else None)
        sampler = Sampler(model, window=window)
        expected = sampler([3, 4], prompt_tokens=prompt)
        tokens = sampler([3, 4], prompt_tokens=prompt, on_step=lambda *given: seen.append(given))
    assert torch.equal(tokens, expected) and torch.equal(tokens[:, :length], prompt)
    assert [step for step, _ in seen] == list(range(LENGTH))
    assert all(torch.equal(part, tokens[:, : step + 1]) for step, part in seen)


@pytest.mark.parametrize(("kind", "batch"), [("packed", 2), ("generator", 8), ("int8", 8)])
@pytest.mark.parametrize("length", PROMPTS)
def test_the_prompts_passes_are_counted(tiny_generator, steps, kind, batch, length):
    gen = tiny_generator()
    with use_reference(kind == "generator"):
        model = PackedGenerator(gen) if kind == "packed" else model_of(gen, torch.int8 if kind == "int8" else None)
        sampler = Sampler(model, window=1)
        sampler(list(range(batch)), prompt_tokens=tokens_of(batch, length))  # 16 rows of up to 16 inputs
    expected = passes_of(length, 2 * batch) + LENGTH - length
    assert sampler.last_run.passes == expected
    assert kind == "packed" or len(steps) == expected
    if expected:
        assert sampler.last_run.tokens_per_pass == pytest.approx(LENGTH / expected)


@GUIDED
def test_a_batch_that_fills_a_pass_with_every_token(tiny_generator, steps, guided):
    """More rows than a pass has inputs: a token a pass, as without a prompt."""
    gen, batch = tiny_generator(), 300
    with use_reference():
        loop = SamplingLoop(gen, batch, guided)
        with torch.no_grad():
            loop.start(*arguments_of(batch, guided, tokens_of(batch, 3)))
    assert steps == [(2 * batch if guided else batch, 1)] * 3
    assert loop.state.passes.unique().tolist() == [3]
