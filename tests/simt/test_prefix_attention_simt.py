"""The CUDA kernels of prefix_attention under the SIMT emulation, against the PyTorch reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from alitok_fast.ops.prefix_attention import prefix_attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def make_case(dtype, batch, length, heads, head_dim, prefix_len, norm, rope, dropout):
    generator = torch.Generator().manual_seed(length * 131 + head_dim)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    weights = [1 + 0.1 * randn(head_dim) for _ in range(2)] if norm else [None, None]
    angle = 3 * randn(length, head_dim // 2)
    table = torch.stack((angle.cos(), angle.sin()), -1)
    table[0] = 0  # the condition's row: query and key are zero vectors
    seed = torch.tensor([0x1234567_89ABCDEF]) if dropout else None
    return {
        "qkv": randn(batch, length, 3, heads, head_dim).to(dtype),
        "prefix_len": prefix_len,
        "q_norm_weight": weights[0],
        "k_norm_weight": weights[1],
        "norm_eps": EPS,
        "rope": table if rope else None,
        "scale": head_dim**-0.5,
        "dropout": dropout,
        "seed": seed,
    }


def inputs_of(case, storage=None, offset=0, row_stride=None, far=None):
    """What the program reads; `storage` holds qkv at `offset` with rows `row_stride` apart. With `far` the program
    itself lays them out so."""
    batch, length, _, heads, head_dim = case["qkv"].shape
    row_stride = row_stride or 3 * heads * head_dim
    threshold = round(case["dropout"] * 65536)
    return {k: v for k, v in case.items() if k not in ("qkv", "dropout")} | {
        "qkv": case["qkv"] if storage is None else storage,
        "offset": offset,
        "far": far,
        "row_stride": row_stride,
        "batch_stride": row_stride * length,
        "batch": batch,
        "length": length,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": DTYPES.index(case["qkv"].dtype),
        "dropout_threshold": threshold,
        "dropout_scale": 1 / (1 - threshold / 65536),
    }


def outputs_of(case):
    batch, length, _, heads, head_dim = case["qkv"].shape
    return {
        "out": ((batch, length, heads, head_dim), case["qkv"].dtype),
        "lse": ((batch, heads, length), torch.float32),
    }


def reference(case, dtype):
    """In `dtype`: float64 for the truth, the case's own for the error that a good kernel may have."""
    qkv = case["qkv"].to(dtype)
    return prefix_attention_reference(**{**case, "qkv": qkv})


def assert_close(name, got, case, index):
    exact, low = reference(case, torch.float64)[index], reference(case, case["qkv"].dtype)[index].double()
    bound = 3 * (low - exact).abs().max() + 2e-6 * exact.abs().max()
    error = (got.double() - exact).abs().max()
    assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


def check(simt, case, sanitizer="address", schedules=2, **layout):
    program = simt.program("prefix_attention", sanitizer)
    result = program.run(inputs_of(case, **layout), outputs_of(case), schedules)
    assert_close("out", result["out"], case, 0)
    assert_close("lse", result["lse"], case, 1)
    return result


# (dtype, batch, length, heads, head_dim, prefix_len, norm, rope, dropout)
CASES = [
    (torch.bfloat16, 1, 70, 2, 48, 0, True, True, 0.0),
    (torch.bfloat16, 2, 137, 1, 64, 17, False, False, 0.0),
    (torch.bfloat16, 1, 140, 1, 80, 0, True, True, 0.1),
    (torch.float16, 1, 67, 1, 64, 67, True, False, 0.0),
    (torch.float16, 1, 130, 1, 128, 65, False, True, 0.25),
    (torch.float16, 2, 1, 3, 8, 0, True, True, 0.0),
    (torch.float32, 1, 70, 2, 48, 0, True, True, 0.0),
    (torch.float32, 1, 133, 1, 64, 133, False, False, 0.1),
    (torch.float32, 1, 33, 1, 104, 5, True, False, 0.0),
    (torch.float32, 1, 66, 1, 72, 1, False, True, 0.0),
    (torch.float32, 1, 70, 1, 128, 0, True, True, 0.1),
    (torch.bfloat16, 1, 300, 1, 16, 150, False, False, 0.2),  # bits of dropout in three groups of columns
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c))
def test_forward(simt, case):
    result = check(simt, make_case(*case))
    assert result.bank_conflicts == 0


# Long sums in float: the matrix units cut sums off, and those errors do not cancel. One order of threads will do.
LONG = [
    (torch.float32, 1, 274, 1, 48, 274, False, False, 0.0),
    (torch.float32, 1, 274, 1, 64, 274, False, True, 0.0),
    (torch.float32, 1, 137, 1, 128, 137, False, False, 0.0),
    (torch.float32, 1, 529, 1, 48, 529, False, False, 0.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG, ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c))
def test_forward_of_long_sums(simt, case):
    check(simt, make_case(*case), schedules=1)


# By prefix_len, 0 is causal. Base-2 logits of zero and of the other sign: what is masked stays masked.
SCALES = [(0, 0.0), (0, -0.3), (5, -0.3), (40, 0.0)]


def scaled_case(dtype, prefix_len, scale):
    return make_case(dtype, 1, 70, 1, 48, prefix_len, True, False, 0.0) | {"scale": scale}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("prefix_len", "scale"), SCALES)
def test_scales_that_are_not_positive(simt, dtype, prefix_len, scale):
    case = scaled_case(dtype, prefix_len, scale)
    check(simt, case, schedules=1)
    check_backward(simt, case, schedules=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_and_strided_qkv(simt, dtype):
    case = make_case(dtype, 2, 19, 2, 24, 3, True, True, 0.0)
    rows = case["qkv"].flatten(2)  # (2, 19, 144)
    storage = torch.full((2, 19, rows.shape[2] + 5), torch.nan, dtype=dtype)
    storage[..., : rows.shape[2]] = rows
    storage = torch.cat((torch.full((1,), torch.nan, dtype=dtype), storage.flatten()))
    check(simt, case, storage=storage, offset=1, row_stride=rows.shape[2] + 5)


def gradients(case, grad_out, dtype):
    """Of qkv and the norm weights, by autograd through the reference computed in `dtype`."""
    leaves = {"qkv": case["qkv"].to(dtype)}
    if case["q_norm_weight"] is not None:
        leaves |= {k: case[k].double() for k in ("q_norm_weight", "k_norm_weight")}
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    out = prefix_attention_reference(**{**case, **leaves})[0]
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.to(dtype))
    return {f"grad_{name}": grad.double() for name, grad in zip(leaves, grads, strict=True)}


def check_backward(simt, case, sanitizer="address", schedules=2, **layout):
    dtype, length = case["qkv"].dtype, case["qkv"].shape[1]
    grad_out = torch.randn(case["qkv"][:, :, 0].shape, generator=torch.Generator().manual_seed(length)).to(dtype)
    out, lse = reference(case, dtype)
    exact, low = gradients(case, grad_out, torch.float64), gradients(case, grad_out, dtype)
    outputs = {name: (tuple(exact[name].shape), torch.float32) for name in exact}
    outputs["grad_qkv"] = (tuple(case["qkv"].shape), dtype)
    inputs = inputs_of(case, **layout) | {"out": out, "lse": lse, "grad_out": grad_out}
    result = simt.program("prefix_attention_backward", sanitizer).run(inputs, outputs, schedules)
    for name in exact:
        bound = 3 * (low[name] - exact[name]).abs().max() + 4e-6 * exact[name].abs().max()
        error = (result[name].double() - exact[name]).abs().max()
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c))
def test_backward(simt, case):
    result = check_backward(simt, make_case(*case))
    assert result.bank_conflicts == 0


# Causal, where the first keys receive something from every query.
LONG_BACKWARD = [
    (torch.float32, 1, 137, 1, 128, 137, False, False, 0.0),
    (torch.float32, 1, 274, 1, 48, 0, True, True, 0.0),
    (torch.float32, 1, 529, 1, 48, 0, True, True, 0.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG_BACKWARD, ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c))
def test_backward_of_long_sums(simt, case):
    check_backward(simt, make_case(*case), schedules=1)


FAR = {"row_stride": 2**31 + 8, "far": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_two_to_the_31_elements(simt, dtype):
    case = make_case(dtype, 2, 3, 2, 24, 1, True, True, 0.0)
    check(simt, case, **FAR)
    check_backward(simt, case, **FAR)


# The programs below hold one tile width of one dtype: they compile in seconds.
HEADER, FORWARD, BACKWARD = "prefix_attention_cuda.h", "prefix_attention_cuda.cu", "prefix_attention_backward_cuda.cu"
ONLY_BF16_48 = [
    (HEADER, "return for_head_dim<float>(p.head_dim, launcher)", "return"),
    (HEADER, "return for_head_dim<__half>(p.head_dim, launcher)", "return"),
    (HEADER, "return launcher.template run<T, 80>()", "return"),
    (HEADER, "return launcher.template run<T, 64>()", "return"),
    (HEADER, "launcher.template run<T, 128>()", "return"),
]


ONLY_FLOAT = [
    (HEADER, "return for_head_dim<__nv_bfloat16>(p.head_dim, launcher)", "return"),
    (HEADER, "return for_head_dim<__half>(p.head_dim, launcher)", "return"),
]


def only_bf16_48(simt, *patches):
    return SimpleNamespace(program=lambda op, sanitizer: simt.program(op, sanitizer, [*ONLY_BF16_48, *patches]))


@pytest.mark.slow
def test_forward_has_no_races(simt):
    case = make_case(torch.bfloat16, 1, 140, 1, 48, 20, True, True, 0.1)
    check(only_bf16_48(simt), case, "thread", schedules=1)


@pytest.mark.slow
def test_backward_has_no_races(simt):
    case = make_case(torch.bfloat16, 1, 140, 1, 48, 20, True, True, 0.1)
    check_backward(only_bf16_48(simt), case, "thread", schedules=1)


COMPLETE = "__syncthreads();  // this tile is complete for all, and nobody reads the other stage any more"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "sanitizer", "message"),
    [
        pytest.param(FORWARD, COMPLETE, "", "thread", "data race", id="forward: no barrier"),
        pytest.param(FORWARD, "shared->v[stage][0]", "shared->v[stage ^ 1][0]",
                     "address", "out: error", id="forward: wrong stage"),
        pytest.param(HEADER, "max(static_cast<int>(p.prefix_len), i + 1)", "max(static_cast<int>(p.prefix_len), i)",
                     "address", "error", id="mask off by one"),
        pytest.param(HEADER, "(valid ? row * rows.row_stride", "(valid ? static_cast<int>(row * rows.row_stride)",
                     "address", "exit code", id="offset of 32 bits"),
        pytest.param(BACKWARD, "n + e >= begin", "n + e > begin", "address", "grad_qkv: error", id="backward: mask"),
        pytest.param(BACKWARD, "keep[first / 128 % 2]", "keep[0]",
                     "address", "grad_qkv: error", id="backward: dropout of the first columns for all"),
        pytest.param(BACKWARD, "keep_of_group(p, scratch.keep, bh, k_first / 128)",
                     "keep_of_group(p, scratch.keep, bh, 0)",
                     "address", "grad_qkv: error", id="backward: dropout of the first keys for all"),
        pytest.param(BACKWARD, "shared->keep[group % 2], keep_of_group", "shared->keep[0], keep_of_group",
                     "thread", "data race", id="backward: one buffer for dropout"),
        pytest.param(BACKWARD, "valid ? first + i : 0), valid", "valid ? i : 0), valid",
                     "address", "grad_qkv: error", id="backward: statistics of the first queries for all"),
        pytest.param("cuda_column_sums.h", "distance = kSumColumns", "distance = 2 * kSumColumns",
                     "address", "grad_q_norm_weight: error", id="backward: sums of half of the tiles"),
    ],
)  # fmt: skip
def test_seeded_bugs_are_caught(simt, file, old, new, sanitizer, message):
    length, dropout = (200, 0.2) if "keep" in old else (130, 0.0)
    case, layout = make_case(torch.bfloat16, 1, length, 1, 48, 3, True, True, dropout), {}
    if "int>(row" in new:
        case, layout = make_case(torch.bfloat16, 1, 5, 1, 48, 3, True, True, 0.0), FAR
    with pytest.raises(AssertionError, match=message):
        run = check_backward if file in (BACKWARD, "cuda_column_sums.h") else check
        run(only_bf16_48(simt, (file, old, new)), case, sanitizer, schedules=1, **layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "run", "case", "message"),
    [
        ("prefix_attention", check, LONG[0], "out: error"),
        ("prefix_attention_backward", check_backward, LONG_BACKWARD[2], "grad_qkv: error"),
    ],
    ids=["forward", "backward"],
)
def test_truncated_sums_are_caught(simt, op, run, case, message):
    program = simt.program(op, patches=[*ONLY_FLOAT, (HEADER, "kSumsFromZero = true", "kSumsFromZero = false")])
    with pytest.raises(AssertionError, match=message):
        run(SimpleNamespace(program=lambda op, sanitizer: program), make_case(*case), schedules=1)
