"""decode_tokens: many steps with their draws against one step and one draw at a time; sample_next on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from alitok_fast._library import use_reference
from alitok_fast.ops.decode import (
    SampleState,
    decode,
    decode_tokens,
    decode_tokens_reference,
    sample_next,
    sample_next_reference,
)
from alitok_fast.ops.decode_weights import LayerWeights, PackedWeights, pack_weights

LAYERS, HEADS, HEAD_DIM, HIDDEN, CODES, CAPACITY = 2, 2, 10, 37, 70, 19
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def make_weights(dtype=torch.float32) -> PackedWeights:
    generator = torch.Generator().manual_seed(0)
    width = HEADS * HEAD_DIM

    def matrix(outputs, inputs):
        return torch.randn(outputs, inputs, generator=generator) * inputs**-0.5

    def layer():
        return LayerWeights(
            torch.ones(width), matrix(3 * width, width), torch.zeros(3 * width), torch.ones(HEAD_DIM),
            torch.ones(HEAD_DIM), matrix(width, width), torch.zeros(width), torch.ones(width),
            matrix(HIDDEN, width), matrix(HIDDEN, width), matrix(width, HIDDEN),
        )  # fmt: skip

    angles = torch.randn(CAPACITY, HEAD_DIM // 2, generator=generator)
    return pack_weights(
        [layer() for _ in range(LAYERS)], torch.ones(width), 3 * matrix(CODES, width), torch.zeros(CODES),
        torch.randn(CODES + 3, width, generator=generator), torch.stack([angles.cos(), angles.sin()], -1), dtype,
    )  # fmt: skip


def make_drawing(batch=3, guided=True, prompt=0, **rule) -> SampleState:
    generator = torch.Generator().manual_seed(1)
    return SampleState(
        ids=torch.randint(CODES + 3, (batch * (2 if guided else 1),), generator=generator),
        tokens=torch.randint(CODES, (batch, CAPACITY), generator=generator),
        prompt_length=torch.tensor(prompt),
        schedule=torch.linspace(1, 5, CAPACITY) if guided else None,
        seed=torch.tensor(-(2**61) - 5),
        image_ids=torch.arange(batch) * 2**33 - 1,
        **rule,
    )


def state(drawing: SampleState, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Poisoned keys and values, and position 0."""
    shape = (2, LAYERS, len(drawing.ids), HEADS, CAPACITY, HEAD_DIM)
    return *torch.full(shape, torch.nan, dtype=dtype), torch.tensor(0)


def one_by_one(weights: PackedWeights, drawing: SampleState, keys: Tensor, values: Tensor, position: Tensor) -> None:
    for _ in range(CAPACITY):
        sample_next(drawing, decode(weights, drawing.ids, keys, values, position), position)
        position += 1


@pytest.mark.parametrize("rule", [{}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.6}])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_one_by_one(cpu_isa, dtype, guided, rule):
    weights = make_weights(dtype)
    for batch, prompt in ((3, 0), (1, 5), (17, CAPACITY)):
        expected, drawing = (make_drawing(batch, guided, prompt, **rule) for _ in range(2))
        expected_state, got_state = state(expected), state(drawing)
        one_by_one(weights, expected, *expected_state)
        for steps in (1, 7, CAPACITY - 8):
            decode_tokens(weights, drawing, *got_state, steps)
        assert torch.equal(drawing.tokens, expected.tokens) and torch.equal(drawing.ids, expected.ids)
        for got, wanted in zip(got_state, expected_state, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("prompt", [0, 4])
def test_equals_reference(cpu_isa, prompt):
    """In float32, whose rounding is far from changing a draw here."""
    weights = make_weights()
    drawing, expected = make_drawing(prompt=prompt), make_drawing(prompt=prompt)
    given = drawing.tokens[:, :prompt].clone()
    decode_tokens(weights, drawing, *state(drawing), CAPACITY)
    decode_tokens_reference(weights, expected, *state(expected), CAPACITY)
    assert torch.equal(drawing.tokens, expected.tokens)
    assert torch.equal(drawing.tokens[:, :prompt], given)
    assert len(drawing.tokens[:, prompt:].unique()) > 10


def test_reference_is_the_explicit_choice():
    weights = make_weights(torch.bfloat16)
    drawing, expected = make_drawing(), make_drawing()
    got_state, expected_state = state(drawing), state(expected)
    with use_reference():
        decode_tokens(weights, drawing, *got_state, 5)
        decode_tokens_reference(weights, expected, *expected_state, 5)
    assert torch.equal(drawing.tokens, expected.tokens)
    assert torch.equal(got_state[0].nan_to_num(), expected_state[0].nan_to_num())


@pytest.mark.parametrize("guided", [False, True])
def test_a_row_without_distribution_is_marked_and_the_others_go_on(cpu_isa, guided):
    weights = make_weights()
    weights.embeddings[CODES + 2] = torch.nan
    healthy, drawing = make_drawing(guided=guided), make_drawing(guided=guided)
    healthy.ids.fill_(CODES), drawing.ids.fill_(CODES)
    drawing.ids[1] = CODES + 2
    decode_tokens(weights, healthy, *state(healthy), CAPACITY)
    decode_tokens(weights, drawing, *state(drawing), CAPACITY)
    assert (drawing.tokens[1] == -1).all()
    assert torch.equal(drawing.tokens[[0, 2]], healthy.tokens[[0, 2]])
    assert drawing.ids[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype):
    weights, threads, drawn = make_weights(dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            drawing = make_drawing()
            decode_tokens(weights, drawing, *state(drawing), CAPACITY)
            drawn.append(drawing.tokens)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_no_images():
    drawing = make_drawing(batch=0)
    *caches, position = state(drawing)
    decode_tokens(make_weights(), drawing, *caches, position, 4)
    assert position == 4


def test_opcheck():
    weights, drawing = make_weights(torch.bfloat16), make_drawing()
    keys, values, position = state(drawing)
    torch.library.opcheck(
        torch.ops.alitok.decode_tokens.default,
        (weights.arena, weights.vectors, weights.embeddings, weights.rope, drawing.ids, keys.zero_(), values.zero_(),
         position, drawing.tokens, drawing.prompt_length, drawing.schedule, 0.7, 5, 0.9, drawing.seed,
         drawing.image_ids, 3, weights.hidden, weights.codes, weights.dtype.itemsize, weights.norm_eps),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "keys: expected size 3 along dimension 1"),
        ({"tokens": torch.zeros(4, CAPACITY, dtype=torch.int64)}, "ids: expected size 8 along dimension 0"),
        (
            {"tokens": torch.zeros(3, 6, dtype=torch.int64)},
            r"tokens: expected size 7 or more along dimension 1, got shape \(3, 6\)",
        ),
        ({"tokens": torch.zeros(3, CAPACITY)}, "tokens: expected int64, got float32"),
        ({"tokens": torch.zeros(CAPACITY, 3, dtype=torch.int64).T}, "tokens: expected a contiguous tensor"),
        (
            {"tokens": torch.full((3, CAPACITY), -1), "prompt_length": torch.tensor(1)},
            "tokens: the prompt: expected a value in 0..69, got -1",
        ),
        (
            {"tokens": torch.full((3, CAPACITY), CODES), "prompt_length": torch.tensor(1)},
            "tokens: the prompt: expected a value in 0..69, got 70",
        ),
        ({"schedule": torch.ones(6)}, r"schedule: expected size 7 or more, got shape \(6,\)"),
        ({"schedule": torch.ones(CAPACITY).double()}, "schedule: expected float32, got float64"),
        ({"schedule": None}, "ids: expected size 3 along dimension 0"),
        ({"seed": torch.tensor([1])}, "seed: expected 0 dimensions, got shape"),
        ({"seed": torch.tensor(1.0)}, "seed: expected int64, got float32"),
        ({"image_ids": torch.arange(2)}, "image_ids: expected size 3 along dimension 0"),
        ({"prompt_length": torch.tensor([0])}, "prompt_length: expected 0 dimensions"),
        ({"temperature": -1.0}, r"temperature: expected 0 \(greedy\) or a number in 1e-30..1e30, got -1"),
        ({"top_k": 0}, "top_k: expected None or a number >= 1, got 0"),
        ({"top_p": 1.5}, r"top_p: expected None or a number in \(0, 1\], got 1.5"),
    ],
)
def test_bad_arguments(changes, message):
    drawing = make_drawing()
    caches = state(drawing)
    with pytest.raises(ValueError, match=message):
        decode_tokens(make_weights(), dataclasses.replace(drawing, **changes), *caches, 7)


@pytest.mark.parametrize(
    ("position", "steps", "message"),
    [
        (0, 0, "steps: expected a value in 1.."),
        (0, CAPACITY + 1, "keys: expected a capacity of 20 or more, got 19"),
        (15, 5, "position: expected a value in 0..14, got 15"),
        (-1, 5, "position: expected a value in 0..14, got -1"),
    ],
)
def test_bad_range(position, steps, message):
    drawing = make_drawing()
    keys, values, _ = state(drawing)
    with pytest.raises(ValueError, match=message):
        decode_tokens(make_weights(), drawing, keys, values, torch.tensor(position), steps)


# ---- sample_next on a GPU: one kernel ----


def copied_to(device, drawing: SampleState) -> SampleState:
    copies = {name: x.to(device, copy=True) for name, x in vars(drawing).items() if isinstance(x, Tensor)}
    return dataclasses.replace(drawing, **copies)


def next_logits(drawing: SampleState, dtype=torch.float32) -> Tensor:
    return (2 * torch.randn(len(drawing.ids), CODES, generator=torch.Generator().manual_seed(2))).to(dtype)


def assert_same_state(got: SampleState, expected: SampleState) -> None:
    assert torch.equal(got.tokens.cpu(), expected.tokens.cpu()) and torch.equal(got.ids.cpu(), expected.ids.cpu())


@pytest.mark.device
@pytest.mark.parametrize("rule", [{}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.6}], ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sample_next_equals_reference(cuda, dtype, guided, rule):
    for batch, prompt, position in ((3, 0, 0), (1, 5, 4), (1, 5, 5), (17, 0, CAPACITY - 1)):
        drawing = make_drawing(batch, guided, prompt, **rule)
        logits, at = next_logits(drawing, dtype), torch.tensor(position)
        if batch > 1:
            logits[1] = torch.nan
        got, operators, expected = copied_to(cuda, drawing), copied_to(cuda, drawing), copied_to("cpu", drawing)
        sample_next(got, logits.to(cuda), at.to(cuda))
        sample_next_reference(operators, logits.to(cuda), at.to(cuda))
        sample_next_reference(expected, logits, at)
        assert_same_state(got, operators)
        assert_same_state(got, expected)


@pytest.mark.device
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("position", [-1, CAPACITY, 2**32, -(2**63)])
def test_sample_next_leaves_all_as_it_is_for_a_position_outside(cuda, position, guided):
    drawing = make_drawing(guided=guided)
    got = copied_to(cuda, drawing)
    sample_next(got, next_logits(drawing).to(cuda), torch.tensor(position, device=cuda))
    assert_same_state(got, drawing)


@pytest.mark.device
def test_sample_next_in_a_graph(cuda):
    """The state, the position and the logits are read anew by each replay."""
    drawing = make_drawing(prompt=4)
    got, expected = copied_to(cuda, drawing), copied_to(cuda, drawing)
    logits, position = next_logits(drawing).to(cuda), torch.tensor(0, device=cuda)
    sample_next(copied_to(cuda, drawing), logits, position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_next(got, logits, position)
        position += 1
    for step in range(CAPACITY):
        logits.copy_(logits.roll(1, dims=1))
        graph.replay()
        sample_next_reference(expected, logits, torch.tensor(step, device=cuda))
        assert_same_state(got, expected)


@pytest.mark.device
def test_sample_next_of_no_images(cuda):
    drawing = copied_to(cuda, make_drawing(batch=0))
    sample_next(drawing, torch.empty(0, CODES, device=cuda), torch.tensor(0, device=cuda))


@pytest.mark.device
def test_sample_next_opcheck(cuda):
    drawing = copied_to(cuda, make_drawing())
    torch.library.opcheck(
        torch.ops.alitok.sample_tokens_next.default,
        (next_logits(drawing).to(cuda), drawing.ids, drawing.tokens, drawing.prompt_length, drawing.schedule, 0.7, 5,
         0.9, drawing.seed, drawing.image_ids, torch.tensor(2, device=cuda)),
    )  # fmt: skip


@pytest.mark.device
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "ids: expected size 6 along dimension 0"),
        ({"ids": torch.zeros(6)}, "ids: expected int64, got float32"),
        ({"tokens": torch.zeros(4, CAPACITY, dtype=torch.int64)}, "tokens: expected size 3 along dimension 0"),
        ({"tokens": torch.zeros(CAPACITY, dtype=torch.int64)}, "tokens: expected 2 dimensions"),
        ({"tokens": torch.zeros(CAPACITY, 3, dtype=torch.int64).T}, "tokens: expected a contiguous tensor"),
        ({"schedule": torch.ones(6)}, f"schedule: expected size {CAPACITY} along dimension 0"),
        ({"schedule": torch.ones(CAPACITY).double()}, "schedule: expected float32, got float64"),
        ({"schedule": None}, "tokens: expected size 6 along dimension 0"),
        ({"seed": torch.tensor(1.0)}, "seed: expected int64, got float32"),
        ({"image_ids": torch.arange(2)}, "image_ids: expected size 3 along dimension 0"),
        ({"prompt_length": torch.tensor([0, 1])}, "prompt_length: expected one element"),
        ({"temperature": -1.0}, r"temperature: expected 0 \(greedy\) or a number in 1e-30..1e30, got -1"),
    ],
)
def test_sample_next_bad_arguments(cuda, changes, message):
    drawing = make_drawing()
    changed = copied_to(cuda, dataclasses.replace(drawing, **changes))
    if "tokens" in changes:  # a copy is contiguous
        changed = dataclasses.replace(changed, tokens=changes["tokens"].to(cuda))
    with pytest.raises(ValueError, match=message):
        sample_next(changed, next_logits(drawing).to(cuda), torch.tensor(0, device=cuda))
