"""The CUDA kernel of sample_tokens and sample_next, emulated: the same ids as the CPU kernel, to the last one."""

import dataclasses
import math

import pytest
import torch

from alitok_fast.ops.decode import SampleState, sample_next_reference
from alitok_fast.ops.sample_tokens import sample_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = {  # of four images
    "temperature": torch.tensor([0.0, 1.0, 0.5, 1.0]),
    "top_k": torch.tensor([0, 3, 0, 0]),
    "top_p": torch.tensor([1.0, 1.0, 0.5, 1.0], dtype=torch.float64),
}


def make_case(codes, dtype=torch.float32, guidance=None, offset=0, padding=0, batch=4, seed=0, **rule):
    """Inputs of the emulated kernel, and what the CPU makes of the same logits."""
    generator = torch.Generator().manual_seed(codes + seed)
    rows = batch if guidance is None else 2 * batch
    memory = torch.full((rows, offset + codes + padding), math.nan)
    memory[:, offset : offset + codes] = 2 * torch.randn(rows, codes, generator=generator)
    if codes > 2:
        memory[1, offset + 1] = math.nan
        memory[2, offset : offset + codes // 2] = -math.inf
    memory = memory.to(dtype)
    draw = {"seed": torch.tensor(2**40 - seed), "image_ids": torch.arange(batch) * 2**31 - 1, "step": torch.tensor(17)}
    expected = sample_tokens(memory[:, offset : offset + codes], guidance_scale=guidance, **rule, **draw)
    inputs = {
        "dtype": DTYPES.index(dtype),
        "batch": batch,
        "codes": codes,
        "logits": memory,
        "offset": offset,
        "row_stride": memory.shape[1],
        "guidance_scale": None if guidance is None else torch.as_tensor(guidance, dtype=torch.float32),
        "guidance_scale_stride": int(isinstance(guidance, torch.Tensor)),
        **draw,
        "image_ids_stride": 1,
    }
    for name, otherwise, dtype in (
        ("temperature", 1.0, torch.float32), ("top_k", 0, torch.int64), ("top_p", 1.0, torch.float64),
    ):  # fmt: skip
        inputs[name] = torch.as_tensor(rule.get(name, otherwise), dtype=dtype)
        inputs[f"{name}_stride"] = inputs[name].dim()
    return inputs, {"ids": ((batch,), torch.int64)}, expected


@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [
        {"codes": 1},
        {"codes": 3, "offset": 1},
        {"codes": 130, "guidance": 3.0},
        {"codes": 1021, "guidance": torch.linspace(0, 8, 4), "dtype": torch.bfloat16, "padding": 1},
        {"codes": 4096, "batch": 3, "dtype": torch.float16},
        {"codes": 200, "temperature": 0.0},
        {"codes": 7, "top_k": 2, "top_p": 0.5},
        {"codes": 260, "guidance": 2.5, "offset": 3, "top_k": 20, "temperature": 0.6},
        {"codes": 128, "dtype": torch.bfloat16, "top_p": 0.8},
        {"codes": 300, "guidance": 1.5, **MIXED},
    ],
    ids=str,
)
def test_same_ids_as_the_cpu(simt, case, sanitizer):
    inputs, outputs, expected = make_case(**case)
    result = simt.program("sample_tokens", sanitizer).run(inputs, outputs, schedules=2)
    assert torch.equal(result["ids"], expected)


def test_rows_longer_than_shared_memory(simt):
    inputs, outputs, expected = make_case(24577, guidance=2.0, batch=3, top_k=20)
    result = simt.program("sample_tokens").run(inputs, outputs, schedules=1)
    assert torch.equal(result["ids"], expected)


def test_bad_settings_are_marked(simt):
    """They lie on the device: the host has not looked."""
    inputs, outputs, _ = make_case(60, seed=5)
    inputs["logits"] = torch.randn(4, 60)
    inputs |= {"temperature": torch.tensor([1.0, math.nan, -1.0, 1e31]), "temperature_stride": 1}
    assert (simt.program("sample_tokens").run(inputs, outputs)["ids"] == -1).tolist() == [False, True, True, True]
    inputs |= {"temperature": torch.ones(4), "top_k": torch.tensor([0, 5, -1, 100]), "top_k_stride": 1}
    inputs |= {"top_p": torch.tensor([1.0, 0.0, 1.0, math.nan], dtype=torch.float64), "top_p_stride": 1}
    assert (simt.program("sample_tokens").run(inputs, outputs)["ids"] == -1).tolist() == [False, True, True, True]


WRITTEN = ("ids", "positions", "tokens", "passes")


def make_next_case(
    codes,
    guided=True,
    position=3,
    prompt_length=0,
    length=5,
    window=1,
    columns=4,
    right=0,
    rests=(),
    alone=(),
    other=None,
    **options,
):
    """Inputs of the emulated kernel, and the state after the definition. The first `right` guesses are right; the rows
    of images in `rests` rest, and so do the unconditional ones of those in `alone`; these differ at column `other`."""
    inputs, _, _ = make_case(codes, guidance=2.0 if guided else None, **options)
    batch, rows, generator = inputs["batch"], inputs["logits"].shape[0], torch.Generator().manual_seed(codes)
    logits = 2 * torch.randn(rows, window, codes, generator=generator)
    if codes > 2 and batch > 1:
        logits[1, :, 1] = math.nan
    logits = logits.to(options.get("dtype", torch.float32))

    def of_images(name):
        return inputs[name].expand(batch).clone()

    prompt_lengths = torch.as_tensor(prompt_length).expand(batch).clone()
    given_tokens = torch.randint(codes, (batch, length), generator=generator)
    guesses = torch.randint(-codes // 2, 2 * codes, (batch, length), generator=generator)  # half of them are none
    state = SampleState(
        ids=torch.randint(codes, (rows, columns), generator=generator),
        positions=torch.as_tensor(position).expand(rows).clone(),
        tokens=torch.where(torch.arange(length) < prompt_lengths[:, None], given_tokens, guesses),
        prompt_lengths=prompt_lengths,
        schedule=torch.linspace(1, 4, length) + torch.arange(batch)[:, None] if guided else None,
        temperature=of_images("temperature"),
        top_k=of_images("top_k"),
        top_p=of_images("top_p"),
        seeds=of_images("seed") + torch.arange(batch),
        image_ids=inputs["image_ids"],
        passes=torch.arange(batch),
    )
    state.positions[[row for image in rests for row in range(image, rows, batch)]] = -1
    state.positions[[batch + image for image in alone]] = -1
    for column in range(1, right + 1):  # what the definition draws after the inputs so far
        seen = copied(state)
        sample_next_reference(seen, logits, window)
        at = (state.positions[:batch] + column - 1).clamp(0, length - 1)
        drawn = seen.tokens.gather(1, at[:, None]).clamp(min=0)
        state.ids[:, column] = drawn.squeeze(1).repeat(rows // batch)
    if other is not None:  # a guess that the unconditional rows were not fed
        state.ids[batch:, other] = (state.ids[batch:, other] + 1) % codes
    expected = copied(state)
    sample_next_reference(expected, logits, window)
    given = {name: value for name, value in vars(state).items() if name not in ("schedule", "seeds", "slots")}
    inputs |= {**given, "logits": logits, "seed": state.seeds, "seed_stride": 1, "offset": 0, "row_stride": codes}
    inputs |= {f"{name}_stride": 1 for name in ("temperature", "top_k", "top_p", "image_ids")}
    inputs |= {"guidance_scale": state.schedule, "guidance_scale_stride": length, "length": length}
    inputs |= {"columns": columns, "window": window}
    return inputs, {name: (getattr(state, name).shape, torch.int64) for name in WRITTEN}, expected


def copied(state):
    return dataclasses.replace(state, **{n: t.clone() for n, t in vars(state).items() if isinstance(t, torch.Tensor)})


def is_the_next(result, state):
    return all(torch.equal(result[name], getattr(state, name)) for name in WRITTEN)


@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [
        {"codes": 130},
        {"codes": 130, "guided": False, "position": 0},
        {"codes": 70, "prompt_length": 3, "position": 2},
        {"codes": 70, "prompt_length": 3, "position": 3, "guided": False},
        {"codes": 260, "position": 4, "top_k": 20, "temperature": 0.6, "dtype": torch.bfloat16},
        {"codes": 128, "top_p": 0.8, "guided": False, "prompt_length": 5},
        {"codes": 64, "temperature": 0.0, "dtype": torch.float16},
        {"codes": 64, "position": 5},
        {"codes": 64, "position": -1, "top_p": 0.5},
        {"codes": 64, "position": 2**32, "guided": False},
        {"codes": 90, **MIXED, "rests": [2], "alone": [0]},
        {"codes": 90, "length": 12, "window": 4},
        {"codes": 90, "length": 12, "window": 4, "right": 3},
        {"codes": 90, "length": 12, "window": 4, "right": 3, "other": 2},
        {"codes": 33, "length": 12, "window": 3, "right": 1, "rests": [0, 3], "alone": [2], "dtype": torch.bfloat16},
        {"codes": 33, "length": 6, "window": 4, "right": 2, "guided": False},
        {"codes": 70, "length": 12, "window": 4, "prompt_length": torch.tensor([6, 9, 4, 30]), "right": 2},
        {"codes": 64, "position": torch.tensor([1, 5, -1, 4] * 2), "window": 3, "right": 1},
    ],
    ids=str,
)
def test_sample_next(simt, case, sanitizer):
    inputs, outputs, state = make_next_case(**case)
    result = simt.program("sample_tokens", sanitizer).run(inputs, outputs, schedules=2)
    assert is_the_next(result, state)


def test_sample_next_marks_a_row_that_is_no_distribution(simt):
    inputs, outputs, state = make_next_case(20)
    result = simt.program("sample_tokens").run(inputs, outputs, schedules=1)
    assert is_the_next(result, state)
    assert result["tokens"][1, 3] == -1 and result["ids"][1, 0] == result["ids"][5, 0] == 0


WINDOW = {"length": 12, "window": 4, "right": 2, "guided": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "case"),
    [
        pytest.param(
            "step < next.prompt_lengths[b]", "step <= next.prompt_lengths[b]", {"prompt_length": 3}, id="prompt"
        ),
        pytest.param(
            "position >= next.length - column", "position > next.length - column", {"position": 5}, id="position"
        ),
        pytest.param("p.guidance_scale.stride + step]", "p.guidance_scale.stride]", {}, id="guidance of another step"),
        pytest.param("ids[0] = last > 0 ? last : 0;", "ids[0] = last;", {}, id="feeds a mark"),
        pytest.param("r < rows; ++r", "r < rows / 2 || r < 1; ++r", {}, id="feeds half of the rows"),
        pytest.param(
            "&& p.next.positions[p.batch + b] >= 0;\n  const float", ";\n  const float", {"alone": [0]}, id="guides all"
        ),
        pytest.param("&& ids[kept] == draws[kept - 1]", "&& ids[kept] == draws[kept]", WINDOW, id="other guess"),
        pytest.param(
            "kept < columns &&", "kept < next.window &&", {**WINDOW, "position": 10}, id="past the end"
        ),
        pytest.param("draws + kept, columns - kept", "draws, columns", WINDOW, id="old guesses"),
        pytest.param("w <= left ?", "w <= left - 99 ?", WINDOW, id="forgets the first guesses"),
        pytest.param("guided ? ids + p.batch * next.columns", "guided ? ids", {**WINDOW, "other": 2}, id="one row"),
        pytest.param("w <= left ?", "w <= left + 1 ?", {**WINDOW, "position": 7}, id="guesses of another image"),
        pytest.param("guess >= 0 && guess < p.codes", "guess >= 0", WINDOW, id="guesses what is no code"),
        pytest.param("next.draws[b * next.window + column]", "next.draws[column]", WINDOW, id="draws of another image"),
    ],
)  # fmt: skip
def test_seeded_bugs_of_sample_next_are_caught(simt, old, new, case):
    program = simt.program("sample_tokens", patches=[("sample_tokens_cuda.cu", old, new)])
    inputs, outputs, state = make_next_case(258, **case)
    try:
        result = program.run(inputs, outputs)
    except simt.Failure:
        return
    assert not is_the_next(result, state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizer", "old", "new", "rule"),
    [
        pytest.param(
            "thread",
            "    if (lane == 0) half[warp] = value;\n    __syncthreads();\n",
            "    if (lane == 0) half[warp] = value;\n",
            {},
            id="missing barrier",
        ),
        pytest.param("thread", "scratch + turn * kMaxWarps", "scratch", {"top_p": 0.9}, id="scratch used too early"),
        pytest.param("address", "k + kGroup > codes", "k > codes", {}, id="reads past the row"),
        pytest.param("address", "!(x[i] >= threshold)", "!(x[i] > threshold)", {"top_p": 1e-9}, id="drops the last"),
    ],
)
def test_seeded_bugs_are_caught(simt, sanitizer, old, new, rule):
    program = simt.program("sample_tokens", sanitizer, patches=[("sample_tokens_cuda.cu", old, new)])
    inputs, outputs, expected = make_case(258, padding=2, **rule)
    try:
        result = program.run(inputs, outputs)
    except simt.Failure:
        return
    assert not torch.equal(result["ids"], expected)
