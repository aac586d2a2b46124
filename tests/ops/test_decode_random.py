"""decode_tokens on random batches: whatever an image's neighbours, windows and guesses are, it has its own tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_decode_tokens import CAPACITY, CODES, DTYPES, make_weights, one_by_one, poisoned, some_images

from alitok_fast.ops.decode import SampleState, decode_tokens

COLUMNS, SLOTS = 16, 12
IMAGES = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.integers(0, CAPACITY) | st.sampled_from([0, CAPACITY - 1, CAPACITY]),
            "temperature": st.just(0.0) | st.floats(0.125, 3.0, width=32),
            "top_k": st.integers(0, CODES + 1),
            "top_p": st.just(1.0) | st.floats(0.01, 1.0),
            "seed": st.integers(-(2**63), 2**63 - 1),
            "image_id": st.integers(-(2**63), 2**63 - 1),
            "guided": st.booleans(),
        }
    ),
    min_size=1,
    max_size=5,
)
CALLS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, COLUMNS)), min_size=1, max_size=4)  # (passes, window)
GUESSES = st.sampled_from(["random", "right", "none", "out of range"])


def drawing_of(images: list[dict], guidance: bool, slots: list[int], seed: int) -> SampleState:
    """A batch at its beginning, with random inputs, prompts and guesses."""
    generator = torch.Generator().manual_seed(seed)
    batch, rows = len(images), len(images) * (2 if guidance else 1)

    def of_images(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([image[name] for image in images], dtype=dtype)

    positions = torch.zeros(rows, dtype=torch.int64)
    if guidance:
        positions[batch:][~of_images("guided", torch.bool)] = -1
    ids = torch.randint(CODES + 3, (rows, COLUMNS), generator=generator)
    ids[batch:, 1:] = ids[:batch, 1:][: rows - batch]  # both rows of an image have its guesses
    return SampleState(
        ids=ids,
        positions=positions,
        tokens=torch.randint(CODES, (batch, CAPACITY), generator=generator),
        prompt_lengths=of_images("prompt", torch.int64),
        schedule=1 + 4 * torch.rand(batch, CAPACITY, generator=generator) if guidance else None,
        temperature=of_images("temperature", torch.float32),
        top_k=of_images("top_k", torch.int64),
        top_p=of_images("top_p", torch.float64),
        seeds=of_images("seed", torch.int64),
        image_ids=of_images("image_id", torch.int64),
        passes=torch.zeros(batch, dtype=torch.int64),
        slots=torch.tensor(slots[:rows]),
    )


def guess(drawing: SampleState, right: torch.Tensor, kind: str, seed: int) -> None:
    """Write guesses behind the prompts; a quarter of the right ones are wrong."""
    generator = torch.Generator().manual_seed(seed)
    shape = drawing.tokens.shape
    wild = torch.tensor([-1, -(2**63), CODES, 2**62, 2**63 - 1])
    guesses = {
        "random": torch.randint(CODES, shape, generator=generator),
        "right": torch.where(torch.rand(shape, generator=generator) < 0.75, right, -1),
        "none": torch.full(shape, -1),
        "out of range": wild[torch.randint(len(wild), shape, generator=generator)],
    }[kind]
    behind = torch.arange(CAPACITY) >= drawing.prompt_lengths[:, None]
    drawing.tokens.copy_(torch.where(behind, guesses, drawing.tokens))


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(IMAGES, st.booleans(), st.permutations(range(SLOTS)), CALLS, GUESSES, st.booleans(), st.integers(0, 2**32))
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_alone_and_in_any_company(cpu_isa, dtype, images, guidance, slots, calls, guesses, half, seed):
    """Its own settings, prompt and guidance; calls of any length, with windows that change. The same bits."""
    weights, cache = make_weights(dtype), torch.bfloat16 if half else torch.float32
    together = drawing_of(images, guidance, slots, seed)
    alone = [some_images(together, [image]) for image in range(len(images))]
    given_tokens = together.tokens.clone()
    for one in alone:
        one_by_one(weights, one, poisoned(one, cache, SLOTS))
    right = torch.cat([one.tokens for one in alone])
    guess(together, right, guesses, seed)
    caches = poisoned(together, cache, SLOTS)
    for passes, window in [*calls, (2 * CAPACITY, calls[-1][1])]:
        before = together.passes.clone()
        decode_tokens(weights, together, *caches, passes, window)
        assert (together.passes - before <= passes).all()
    assert torch.equal(together.tokens, right)
    assert (together.positions == -1).all()
    prompts = torch.arange(CAPACITY) < together.prompt_lengths[:, None]
    assert torch.equal(together.tokens[prompts], given_tokens[prompts])
    fed = 2 * len(images) if guidance else len(images)
    assert caches[:, :, slots[fed:]].isnan().all(), "no one's sequences"
    assert (together.passes <= CAPACITY).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_guesses_in_tokens_are_taken(dtype):
    """Else the random batches would say nothing of guesses: with all of them right a window is settled at once."""
    weights = make_weights(dtype)
    image = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 5, "image_id": 3, "guided": True}
    drawing = drawing_of([{**image, "prompt": 4}, {**image, "prompt": 0}], True, list(range(4)), 1)
    whole = some_images(drawing, [0, 1])
    one_by_one(weights, whole, poisoned(whole))
    drawing.tokens.copy_(whole.tokens)
    drawing.ids[:, 1:] = whole.tokens[:, : COLUMNS - 1].repeat(2, 1)
    decode_tokens(weights, drawing, *poisoned(drawing), CAPACITY, COLUMNS)
    assert torch.equal(drawing.tokens, whole.tokens)
    assert drawing.passes.tolist() == [2, 2]
