"""The CUDA kernel of sample_tokens and sample_next, emulated: the same ids as the CPU kernel, to the last one."""

import math

import pytest
import torch

from alitok_fast.ops.decode import SampleState, sample_next_reference
from alitok_fast.ops.sample_tokens import sample_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
        "guidance_stride": int(isinstance(guidance, torch.Tensor)),
        "temperature": rule.get("temperature", 1.0),
        "top_k": rule.get("top_k") or codes,
        "top_p": rule.get("top_p") or 1.0,
        **draw,
    }
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


def make_next_case(codes, guided=True, position=3, prompt_length=0, length=5, **options):
    """Inputs of the emulated kernel, and the state after the definition; for a position out of range, before it."""
    inputs, _, _ = make_case(codes, guidance=2.0 if guided else None, **options)
    batch, offset, generator = inputs["batch"], inputs["offset"], torch.Generator().manual_seed(codes)
    written = {
        "ids": torch.full((batch * (2 if guided else 1),), 77),
        "tokens": torch.randint(codes, (batch, length), generator=generator),
    }
    given = {
        "prompt_length": torch.tensor(prompt_length),
        "schedule": torch.linspace(1, 4, length) if guided else None,
        "seed": inputs["seed"],
        "image_ids": inputs["image_ids"],
    }
    rule = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
    state = SampleState(**{name: tensor.clone() for name, tensor in written.items()}, **given, **rule)
    if 0 <= position < length:
        sample_next_reference(state, inputs["logits"][:, offset : offset + codes], torch.tensor(position))
    inputs |= {**written, **given, "guidance_scale": given["schedule"], "step": torch.tensor(position)}
    inputs |= {"length": length, "guidance_stride": 0}
    del inputs["schedule"]
    return inputs, {name: (tensor.shape, torch.int64) for name, tensor in written.items()}, state


def assert_is_the_next(result, state):
    assert torch.equal(result["tokens"], state.tokens) and torch.equal(result["ids"], state.ids)


@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [
        {"codes": 130},
        {"codes": 130, "guided": False, "position": 0},
        {"codes": 70, "prompt_length": 3, "position": 2},
        {"codes": 70, "prompt_length": 3, "position": 3, "guided": False},
        {"codes": 260, "position": 4, "top_k": 20, "temperature": 0.6, "dtype": torch.bfloat16, "offset": 1},
        {"codes": 128, "top_p": 0.8, "guided": False, "prompt_length": 5},
        {"codes": 64, "temperature": 0.0, "dtype": torch.float16},
        {"codes": 64, "position": 5},
        {"codes": 64, "position": -1, "top_p": 0.5},
        {"codes": 64, "position": 2**32, "guided": False},
    ],
    ids=str,
)
def test_sample_next(simt, case, sanitizer):
    inputs, outputs, state = make_next_case(**case)
    result = simt.program("sample_tokens", sanitizer).run(inputs, outputs, schedules=2)
    assert_is_the_next(result, state)


def test_sample_next_marks_a_row_that_is_no_distribution(simt):
    inputs, outputs, state = make_next_case(20)
    result = simt.program("sample_tokens").run(inputs, outputs, schedules=1)
    assert_is_the_next(result, state)
    assert result["tokens"][1, 3] == -1 and result["ids"][1] == result["ids"][5] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "case"),
    [
        pytest.param(
            "position < *p.next.prompt_length", "position <= *p.next.prompt_length", {"prompt_length": 3}, id="prompt"
        ),
        pytest.param("position >= p.next.length", "position > p.next.length", {"position": 5}, id="position"),
        pytest.param("b * p.guidance_stride : *p.step", "b * p.guidance_stride : 0", {}, id="guidance of another step"),
        pytest.param("code > 0 ? code : 0", "code", {}, id="feeds a mark"),
        pytest.param("p.ids[p.batch + b] = code", "p.ids[b] = code", {}, id="feeds half of the rows"),
    ],
)
def test_seeded_bugs_of_sample_next_are_caught(simt, old, new, case):
    program = simt.program("sample_tokens", patches=[("sample_tokens_cuda.cu", old, new)])
    inputs, outputs, state = make_next_case(258, **case)
    try:
        result = program.run(inputs, outputs)
    except simt.Failure:
        return
    assert not (torch.equal(result["tokens"], state.tokens) and torch.equal(result["ids"], state.ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizer", "old", "new", "rule"),
    [
        pytest.param("thread", "    __syncthreads();\n", "", {}, id="missing barrier"),
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
