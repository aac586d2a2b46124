"""decode_tokens: many passes with their draws against one step and one draw at a time; sample_next on a GPU."""

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
NARROW = "int8, narrow"  # int8 weights times 8-bit activations
DTYPES = [torch.float32, torch.bfloat16, torch.int8, NARROW]


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
        torch.randn(CODES + 3, width, generator=generator), torch.stack([angles.cos(), angles.sin()], -1),
        torch.int8 if dtype == NARROW else dtype, activation_dtype=torch.int8 if dtype == NARROW else None,
    )  # fmt: skip


COLUMNS = 8
RULES = [{}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.6}]


def make_drawing(batch=3, guided=True, prompt: int | list[int] = 0, **rule) -> SampleState:
    """Sequences at their beginning; settings for all images, or a list with one for each."""
    generator = torch.Generator().manual_seed(1)
    rows = batch * (2 if guided else 1)

    def of_images(name, value, dtype):
        return torch.tensor(rule.get(name, value), dtype=dtype).expand(batch).clone()

    schedule = torch.linspace(1, 5, CAPACITY) + torch.arange(batch)[:, None] / 8
    lengths = torch.tensor(prompt).expand(batch).clone()
    given = torch.randint(CODES, (batch, CAPACITY), generator=generator)
    guesses = torch.randint(-5, CODES + 5, (batch, CAPACITY), generator=generator)  # some are none
    return SampleState(
        ids=torch.randint(CODES + 3, (rows, COLUMNS), generator=generator),
        positions=torch.zeros(rows, dtype=torch.int64),
        tokens=torch.where(torch.arange(CAPACITY) < lengths[:, None], given, guesses),
        prompt_lengths=lengths,
        schedule=schedule if guided else None,
        temperature=of_images("temperature", 1.0, torch.float32),
        top_k=of_images("top_k", 0, torch.int64),
        top_p=of_images("top_p", 1.0, torch.float64),
        seeds=of_images("seed", -(2**61) - 5, torch.int64),
        image_ids=torch.arange(batch) * 2**33 - 1,
        passes=torch.zeros(batch, dtype=torch.int64),
    )


def poisoned(drawing: SampleState, dtype=torch.float32, slots=None) -> Tensor:
    """Keys and values."""
    return torch.full((2, LAYERS, slots or len(drawing.ids), HEADS, CAPACITY, HEAD_DIM), torch.nan, dtype=dtype)


def one_by_one(weights: PackedWeights, drawing: SampleState, caches: Tensor) -> None:
    """The definition: a step, a draw, and so on."""
    while (drawing.positions >= 0).any():
        logits = decode(weights, drawing.ids[:, :1].contiguous(), *caches, drawing.positions, drawing.slots)
        sample_next(drawing, logits, 1)


def some_images(drawing: SampleState, images: list[int]) -> SampleState:
    """A copy of the state of these images alone."""
    batch = len(drawing.tokens)
    rows = images if drawing.schedule is None else [*images, *(batch + image for image in images)]
    parts = {}
    for name, value in vars(drawing).items():
        if isinstance(value, Tensor):
            parts[name] = value[rows if name in ("ids", "positions", "slots") else images].clone()
    return dataclasses.replace(drawing, **parts)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_one_by_one(cpu_isa, dtype, guided, rule):
    """Tokens and cache to the last bit, for any number of passes a call and any window."""
    weights = make_weights(dtype)
    for batch, prompt, window in (
        (3, 0, 1),
        (1, 5, 3),
        (17, CAPACITY, 2),
        (2, CAPACITY - 1, 8),
        (5, [0, 1, 4, 9, 30], 5),
    ):
        expected, drawing = (make_drawing(batch, guided, prompt, **rule) for _ in range(2))
        expected_caches, caches = poisoned(expected), poisoned(drawing)
        one_by_one(weights, expected, expected_caches)
        calls = [1, 7, CAPACITY]
        for passes in calls:
            decode_tokens(weights, drawing, *caches, passes, window)
        assert torch.equal(drawing.tokens, expected.tokens)
        assert (drawing.positions == -1).all() and (expected.positions == -1).all()
        assert (drawing.passes <= expected.passes).all()
        drawn = torch.cat([drawing.prompt_lengths < CAPACITY] * (2 if guided else 1))
        assert torch.equal(caches[:, :, drawn], expected_caches[:, :, drawn])


@pytest.mark.parametrize("guided", [False, True])
def test_right_guesses_save_passes(guided):
    """What is fed as a guess decides the passes, and nothing else."""
    weights = make_weights()
    for window in (1, 2, 8):
        whole, told = make_drawing(guided=guided), make_drawing(guided=guided)
        decode_tokens(weights, whole, *poisoned(whole), CAPACITY)
        told.ids[:, 1:] = whole.tokens[:, : COLUMNS - 1].repeat(2 if guided else 1, 1)
        decode_tokens(weights, told, *poisoned(told), 1, window)
        assert (told.positions == window).all()
        assert torch.equal(told.tokens[:, :window], whole.tokens[:, :window])
        assert told.passes.tolist() == [1, 1, 1] and whole.passes.tolist() == [CAPACITY] * 3


def test_a_call_may_end_within_a_prompt():
    """More rows than one pass reads: between two calls the rows of an image are not at one position."""
    weights = make_weights()
    expected, drawing = (make_drawing(30, prompt=CAPACITY - 2) for _ in range(2))
    expected_caches, caches = poisoned(expected), poisoned(drawing)
    decode_tokens(weights, expected, *expected_caches, CAPACITY)
    apart = False
    for _ in range(2 * CAPACITY):
        decode_tokens(weights, drawing, *caches, 1, 2)
        apart |= not torch.equal(drawing.positions[:30], drawing.positions[30:])
    assert apart and torch.equal(drawing.tokens, expected.tokens) and torch.equal(caches, expected_caches)


@pytest.mark.parametrize("row", [0, 1], ids=["conditional", "unconditional"])
def test_a_guess_counts_where_both_rows_were_fed_it(row):
    weights = make_weights()
    whole = make_drawing(batch=1)
    decode_tokens(weights, whole, *poisoned(whole), CAPACITY)
    for step in (decode_tokens, decode_tokens_reference):
        told = make_drawing(batch=1)
        told.ids[:, 1:] = whole.tokens[:, : COLUMNS - 1]
        told.ids[row, 3] = (told.ids[row, 3] + 1) % CODES
        caches = poisoned(told)
        step(weights, told, *caches, 1, 8)
        assert told.positions.tolist() == [3, 3]
        step(weights, told, *caches, CAPACITY, 8)
        assert torch.equal(told.tokens, whole.tokens)


@pytest.mark.parametrize("guided", [False, True])
def test_guesses_before_the_first_look(guided):
    """Tokens that lie behind the position are guesses; what is no code is none, and the one before it is guessed."""
    weights = make_weights()
    whole = make_drawing(guided=guided)
    decode_tokens(weights, whole, *poisoned(whole), CAPACITY)
    for step in (decode_tokens, decode_tokens_reference):
        told, wrong = make_drawing(guided=guided), make_drawing(guided=guided)
        told.tokens.copy_(whole.tokens)
        told.ids[:, 1:] = whole.tokens[:, : COLUMNS - 1].repeat(2 if guided else 1, 1)
        wrong.tokens.copy_(torch.tensor([-1, CODES, 2**62])[:, None].expand_as(wrong.tokens))
        for drawing in (told, wrong):
            step(weights, drawing, *poisoned(drawing), CAPACITY, 4)
            assert torch.equal(drawing.tokens, whole.tokens)
        assert told.passes.tolist() == [-(-CAPACITY // 4)] * 3
        assert (wrong.passes > told.passes).all()


def test_each_image_has_its_own_settings():
    """Images with other seeds, rules, prompts, beginnings and with no guidance in one batch, as each of them alone."""
    weights = make_weights(torch.bfloat16)
    rule = {
        "temperature": [0.0, 1.0, 0.7, 1.0],
        "top_k": [0, 3, 0, 0],
        "top_p": [1.0, 1.0, 0.5, 1.0],
        "seed": [1, 2, 3, 4],
    }

    def drawing() -> SampleState:
        made = dataclasses.replace(
            make_drawing(4, prompt=[0, 6, 2, 3], **rule), slots=torch.tensor([9, 2, 4, 0, 1, 8, 3, 7])
        )
        made.positions[4 + 2] = -1  # no guidance
        return made

    together = drawing()
    caches = poisoned(together, torch.bfloat16, slots=10)
    decode_tokens(weights, together, *caches, 2 * CAPACITY, 3)
    assert caches[:, :, [5, 6, 3]].isnan().all(), "no one's sequences"
    for image in range(4):
        alone = some_images(drawing(), [image])
        decode_tokens(weights, alone, *poisoned(alone, torch.bfloat16, slots=10), 2 * CAPACITY, 1)
        assert torch.equal(alone.tokens[0], together.tokens[image])


def test_images_join_and_leave():
    """Half of them begin when the others are under way."""
    weights = make_weights(torch.int8)
    expected, drawing = make_drawing(4), make_drawing(4)
    decode_tokens(weights, expected, *poisoned(expected), CAPACITY)
    late = torch.tensor([1, 3, 5, 7])
    drawing.positions[late] = -1
    caches = poisoned(drawing)
    decode_tokens(weights, drawing, *caches, 5, 2)
    drawing.positions[late] = 0
    decode_tokens(weights, drawing, *caches, 3 * CAPACITY, 4)
    assert torch.equal(drawing.tokens, expected.tokens)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("prompt", [0, 4])
def test_equals_reference(cpu_isa, prompt, window):
    """In float32, whose rounding is far from changing a draw here."""
    weights = make_weights()
    drawing, expected = make_drawing(prompt=prompt), make_drawing(prompt=prompt)
    given = drawing.tokens[:, :prompt].clone()
    decode_tokens(weights, drawing, *poisoned(drawing), CAPACITY, window)
    decode_tokens_reference(weights, expected, *poisoned(expected), CAPACITY, window)
    assert torch.equal(drawing.tokens, expected.tokens)
    assert torch.equal(drawing.tokens[:, :prompt], given)
    assert len(drawing.tokens[:, prompt:].unique()) > 10


def test_reference_is_the_explicit_choice():
    weights = make_weights(torch.bfloat16)
    drawing, expected = make_drawing(), make_drawing()
    caches, expected_caches = poisoned(drawing), poisoned(expected)
    with use_reference():
        decode_tokens(weights, drawing, *caches, 5)
        decode_tokens_reference(weights, expected, *expected_caches, 5)
    assert torch.equal(drawing.tokens, expected.tokens)
    assert torch.equal(caches.nan_to_num(), expected_caches.nan_to_num())


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("window", [1, 3])
def test_a_row_without_distribution_is_marked_and_the_others_go_on(cpu_isa, guided, window):
    weights = make_weights()
    weights.embeddings[CODES + 2] = torch.nan
    healthy, drawing = make_drawing(guided=guided), make_drawing(guided=guided)
    healthy.ids.fill_(CODES), drawing.ids.fill_(CODES)
    drawing.ids[1, 0] = CODES + 2
    decode_tokens(weights, healthy, *poisoned(healthy), CAPACITY, window)
    decode_tokens(weights, drawing, *poisoned(drawing), CAPACITY, window)
    assert (drawing.tokens[1] == -1).all()
    assert torch.equal(drawing.tokens[[0, 2]], healthy.tokens[[0, 2]])
    assert drawing.ids[1, 0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype):
    weights, threads, drawn = make_weights(dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            drawing = make_drawing(prompt=2)
            decode_tokens(weights, drawing, *poisoned(drawing), CAPACITY, 3)
            drawn.append((drawing.tokens, drawing.passes))
    finally:
        torch.set_num_threads(threads)
    for tokens, passes in drawn[1:]:
        assert torch.equal(tokens, drawn[0][0]) and torch.equal(passes, drawn[0][1])


def test_no_images_and_all_at_rest():
    drawing = make_drawing(batch=0)
    decode_tokens(make_weights(), drawing, *poisoned(drawing), 4)
    resting = make_drawing()
    resting.positions.fill_(-1)
    before = resting.tokens.clone()
    caches = poisoned(resting)
    decode_tokens(make_weights(), resting, *caches, 4)
    assert torch.equal(resting.tokens, before) and caches.isnan().all() and not resting.passes.any()


def test_opcheck():
    weights, drawing = make_weights(torch.bfloat16), make_drawing(prompt=1)
    keys, values = poisoned(drawing).zero_()
    torch.library.opcheck(
        torch.ops.alitok.decode_tokens.default,
        (weights.arena, weights.vectors, weights.embeddings, weights.rope, drawing.ids, keys, values,
         drawing.positions, None, drawing.tokens, drawing.prompt_lengths, drawing.schedule, drawing.temperature,
         drawing.top_k, drawing.top_p, drawing.seeds, drawing.image_ids, drawing.passes, 3, 2, weights.hidden,
         weights.codes, weights.dtype.itemsize, weights.activation_dtype.itemsize, weights.norm_eps),
    )  # fmt: skip


LONG, ONES = torch.int64, torch.ones(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(3, 8, dtype=LONG)}, "positions: expected size 3 along dimension 0"),
        ({"ids": torch.full((6, 8), CODES + 3)}, "ids: expected a value in 0..72, got 73"),
        ({"tokens": torch.zeros(4, CAPACITY, dtype=LONG)}, "ids: expected size 8 along dimension 0"),
        (
            {"tokens": torch.zeros(3, CAPACITY + 1, dtype=LONG)},
            "tokens: size along dimension 1: expected a value in 1..19, got 20",
        ),
        ({"tokens": torch.zeros(3, CAPACITY)}, "tokens: expected int64, got float32"),
        ({"tokens": torch.zeros(CAPACITY, 3, dtype=LONG).T}, "tokens: expected a contiguous tensor"),
        (
            {"tokens": torch.full((3, CAPACITY), -1), "prompt_lengths": torch.tensor([0, 1, 0])},
            "tokens: the prompt: expected a value in 0..69, got -1",
        ),
        (
            {"tokens": torch.full((3, CAPACITY), CODES), "prompt_lengths": torch.tensor([0, 0, 1])},
            "tokens: the prompt: expected a value in 0..69, got 70",
        ),
        ({"schedule": torch.ones(CAPACITY)}, r"schedule: expected 2 dimensions, got shape \(19,\)"),
        ({"schedule": torch.ones(3, 6)}, r"schedule: expected size 19 along dimension 1, got shape \(3, 6\)"),
        ({"schedule": torch.ones(3, CAPACITY).double()}, "schedule: expected float32, got float64"),
        ({"schedule": None}, "ids: expected size 3 along dimension 0"),
        ({"seeds": torch.tensor([1])}, r"seeds: expected shape \(\) or \(3,\), got shape \(1,\)"),
        ({"seeds": ONES}, "seeds: expected int64, got float32"),
        ({"image_ids": torch.arange(2)}, r"image_ids: expected shape \(\) or \(3,\), got shape \(2,\)"),
        ({"prompt_lengths": torch.tensor([0])}, "prompt_lengths: expected size 3 along dimension 0"),
        ({"passes": torch.zeros(2, dtype=LONG)}, "passes_done: expected size 3 along dimension 0"),
        ({"temperature": -ONES}, r"temperature: expected 0 \(greedy\) or a number in 1e-30..1e30, got -1"),
        ({"temperature": ONES * torch.nan}, r"temperature: expected 0 \(greedy\) or a number in .*, got -?nan"),
        ({"temperature": ONES.double()}, "temperature: expected float32, got float64"),
        ({"top_k": torch.tensor([0, 0, -1])}, r"top_k: expected 0 \(all\) or more, got -1"),
        ({"top_k": torch.tensor([1, 2])}, r"top_k: expected shape \(\) or \(3,\), got shape \(2,\)"),
        ({"top_p": 1.5 * ONES.double()}, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"top_p": torch.nan * ONES.double()}, r"top_p: expected a number in \(0, 1\], got -?nan"),
        ({"top_p": ONES}, "top_p: expected float64, got float32"),
        ({"positions": torch.tensor([0, 0, 0, 0, 1, 0])}, "positions: expected the same for both rows of an image"),
        ({"positions": torch.tensor([0, -1, 0, 0, 0, 0])}, "positions: expected the same for both rows of an image"),
        ({"positions": torch.full((6,), CAPACITY)}, "positions: expected a value in -1..18, got 19"),
        ({"positions": torch.full((6,), -2)}, "positions: expected a value in -1..18, got -2"),
        ({"slots": torch.tensor([0, 1, 2, 3, 4, 4])}, "slots: expected another one for each row, got slot 4 twice"),
    ],
)
def test_bad_arguments(changes, message):
    drawing = dataclasses.replace(make_drawing(), **changes)
    before = {name: value.clone() for name, value in vars(drawing).items() if isinstance(value, Tensor)}
    caches = poisoned(make_drawing())
    with pytest.raises(ValueError, match=message):
        decode_tokens(make_weights(), drawing, *caches, 7, 2)
    assert caches.isnan().all()
    assert all(torch.equal(vars(drawing)[name], value) or value.isnan().any() for name, value in before.items())


@pytest.mark.parametrize(
    ("passes", "window", "message"),
    [
        (0, 1, "passes: expected a value in 1.."),
        (1, 0, "window: expected a value in 1..8, got 0"),
        (1, 9, "window: expected a value in 1..8, got 9"),
    ],
)
def test_bad_range(passes, window, message):
    drawing = make_drawing()
    with pytest.raises(ValueError, match=message):
        decode_tokens(make_weights(), drawing, *poisoned(drawing), passes, window)


# ---- sample_next on a GPU ----


def copied_to(device, drawing: SampleState) -> SampleState:
    copies = {name: x.to(device, copy=True) for name, x in vars(drawing).items() if isinstance(x, Tensor)}
    return dataclasses.replace(drawing, **copies)


def next_logits(drawing: SampleState, window: int, dtype=torch.float32) -> Tensor:
    shape = len(drawing.ids), window, CODES
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(2))).to(dtype)


def assert_same_state(got: SampleState, expected: SampleState) -> None:
    for name in ("tokens", "ids", "positions", "passes"):
        assert torch.equal(getattr(got, name).cpu(), getattr(expected, name).cpu()), name


@pytest.mark.device
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sample_next_equals_reference(cuda, dtype, guided, rule):
    for batch, prompt, position, window in (
        (3, 0, 0, 1), (1, 5, 4, 1), (1, 5, 5, 2), (17, 0, CAPACITY - 1, 1), (4, 2, CAPACITY - 3, 5), (2, 6, 1, 8),
    ):  # fmt: skip
        drawing = make_drawing(batch, guided, prompt, **rule)
        drawing.positions.fill_(position)
        logits = next_logits(drawing, window, dtype)
        if batch > 1:
            logits[1] = torch.nan
        if batch > 3:
            drawing.positions[2::batch] = -1
        for guess in range(window):  # so many inputs behind the first are right
            got, operators, expected = copied_to(cuda, drawing), copied_to(cuda, drawing), copied_to("cpu", drawing)
            sample_next(got, logits.to(cuda), window)
            sample_next_reference(operators, logits.to(cuda), window)
            sample_next_reference(expected, logits, window)
            assert_same_state(got, operators)
            assert_same_state(got, expected)
            if guess + 1 < window and position + guess < CAPACITY:
                right = expected.tokens[:, position + guess].clamp(min=0)
                drawing.ids[:, guess + 1] = right.repeat(2 if guided else 1)


@pytest.mark.device
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("position", [-1, CAPACITY, 2**32, -(2**63)])
@pytest.mark.parametrize("window", [1, 3])
def test_sample_next_leaves_all_as_it_is_for_a_position_outside(cuda, position, guided, window):
    drawing = make_drawing(guided=guided)
    drawing.positions.fill_(position)
    got = copied_to(cuda, drawing)
    sample_next(got, next_logits(drawing, window).to(cuda), window)
    assert_same_state(got, drawing)


@pytest.mark.device
@pytest.mark.parametrize("window", [1, 3])
def test_sample_next_in_a_graph(cuda, window):
    """The state, the positions and the logits are read anew by each replay."""
    drawing = make_drawing(prompt=4)
    got, expected = copied_to(cuda, drawing), copied_to(cuda, drawing)
    logits = next_logits(drawing, window).to(cuda)
    sample_next(copied_to(cuda, drawing), logits, window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_next(got, logits, window)
    for _ in range(CAPACITY):
        logits.copy_(logits.roll(1, dims=2))
        graph.replay()
        sample_next_reference(expected, logits, window)
        assert_same_state(got, expected)
    assert (got.positions == -1).all()


@pytest.mark.device
def test_sample_next_of_no_images(cuda):
    drawing = copied_to(cuda, make_drawing(batch=0))
    sample_next(drawing, torch.empty(0, 2, CODES, device=cuda), 2)


@pytest.mark.device
@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"temperature": torch.nan}, {"top_k": -1}, {"top_p": 0.0}])
def test_sample_next_marks_images_with_bad_settings(cuda, setting):
    drawing = copied_to(cuda, make_drawing(**setting))
    sample_next(drawing, next_logits(drawing, 1).to(cuda), 1)
    assert (drawing.tokens[:, 0] == -1).all() and (drawing.ids[:, 0] == 0).all()


@pytest.mark.device
def test_sample_next_opcheck(cuda):
    drawing = copied_to(cuda, make_drawing())
    torch.library.opcheck(
        torch.ops.alitok.sample_tokens_next.default,
        (next_logits(drawing, 2).to(cuda), drawing.ids, drawing.positions, drawing.tokens, drawing.prompt_lengths,
         drawing.schedule, drawing.temperature, drawing.top_k, drawing.top_p, drawing.seeds, drawing.image_ids,
         drawing.passes, 2),
    )  # fmt: skip


@pytest.mark.device
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(3, 8, dtype=LONG)}, "ids: expected size 6 along dimension 0"),
        ({"ids": torch.zeros(6, 1, dtype=LONG)}, "ids: expected size 2 or more along dimension 1"),
        ({"ids": torch.zeros(6, 8)}, "ids: expected int64, got float32"),
        ({"positions": torch.zeros(3, dtype=LONG)}, "positions: expected size 6 along dimension 0"),
        ({"tokens": torch.zeros(4, CAPACITY, dtype=LONG)}, "tokens: expected size 3 along dimension 0"),
        ({"tokens": torch.zeros(CAPACITY, dtype=LONG)}, "tokens: expected 2 dimensions"),
        ({"tokens": torch.zeros(CAPACITY, 3, dtype=LONG).T}, "tokens: expected a contiguous tensor"),
        ({"schedule": torch.ones(3, 6)}, f"schedule: expected size {CAPACITY} along dimension 1"),
        ({"schedule": torch.ones(3, CAPACITY).double()}, "schedule: expected float32, got float64"),
        ({"schedule": None}, "tokens: expected size 6 along dimension 0"),
        ({"seeds": ONES}, "seeds: expected int64, got float32"),
        ({"image_ids": torch.arange(2)}, r"image_ids: expected shape \(\) or \(3,\)"),
        ({"prompt_lengths": torch.tensor([0, 1])}, "prompt_lengths: expected size 3 along dimension 0"),
        ({"top_k": ONES}, "top_k: expected int64, got float32"),
    ],
)
def test_sample_next_bad_arguments(cuda, changes, message):
    drawing = make_drawing()
    changed = copied_to(cuda, dataclasses.replace(drawing, **changes))
    if "tokens" in changes:  # a copy is contiguous
        changed = dataclasses.replace(changed, tokens=changes["tokens"].to(cuda))
    with pytest.raises(ValueError, match=message):
        sample_next(changed, next_logits(drawing, 2).to(cuda), 2)
