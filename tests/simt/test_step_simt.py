"""The CUDA kernels of add_rms_norm and swiglu, emulated, against the references."""

import pytest
import torch

from alitok_fast.ops.add_rms_norm import add_rms_norm_reference
from alitok_fast.ops.swiglu import swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_case(dtype, weight_dtype, rows, width, dropout=0.0, with_delta=True):
    """Arguments of the operator, and what the program reads besides them."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator)
    delta = torch.randn(rows, width, generator=generator).to(dtype) if with_delta else None
    weight = (1 + 0.1 * torch.randn(width, generator=generator)).to(weight_dtype)
    seed = torch.tensor([-77]) if dropout else None
    threshold = round(dropout * 65536)
    sizes = {"rows": rows, "width": width, "dropout_threshold": threshold, "dropout_scale": 65536 / (65536 - threshold)}
    kinds = {"dtype": DTYPES.index(dtype), "weight_dtype": DTYPES.index(weight_dtype)}
    arguments = {"x": x, "delta": delta, "weight": weight, "seed": seed}
    return arguments, dropout, {**arguments, **sizes, **kinds}


def reference(arguments, dropout):
    return add_rms_norm_reference(*(arguments[n] for n in ("x", "delta", "weight")), 1e-5, dropout, arguments["seed"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 48), (2, 768), (1, 2050)])
def test_add_rms_norm(simt, dtype, with_delta, rows, width):
    arguments, dropout, inputs = make_case(dtype, dtype, rows, width, 0.2 if with_delta else 0.0, with_delta)
    outputs = {"normed": ((rows, width), dtype)}
    if with_delta:
        outputs["sum"] = ((rows, width), torch.float32)
    result = simt.program("add_rms_norm").run(inputs, outputs, schedules=2)
    total, normed = reference(arguments, dropout)
    if with_delta:
        torch.testing.assert_close(result["sum"], total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result["normed"], normed, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def check_backward(
    simt, dtype, weight_dtype, rows, width, dropout=0.2, with_delta=True, sanitizer="address", **patches
):
    arguments, dropout, inputs = make_case(dtype, weight_dtype, rows, width, dropout, with_delta)
    generator = torch.Generator().manual_seed(1)
    grad_sum = torch.randn(rows, width, generator=generator) if with_delta else None
    grad_normed = torch.randn(rows, width, generator=generator).to(dtype)

    def gradients(compute):
        leaves = {n: t.to(compute).requires_grad_() for n, t in arguments.items() if t is not None and n != "seed"}
        results = reference({"delta": None, "seed": arguments["seed"], **leaves}, dropout)
        chosen = [(r, g) for r, g in zip(results, (grad_sum, grad_normed), strict=True) if g is not None]
        directions = [g.to(r.dtype) for r, g in chosen]
        return dict(
            zip(leaves, torch.autograd.grad([r for r, _ in chosen], list(leaves.values()), directions), strict=True)
        )

    inputs |= {"x": reference(arguments, dropout)[0] if with_delta else arguments["x"], "backward": 1}
    inputs |= {"grad_sum": grad_sum, "grad_normed": grad_normed}
    outputs = {"grad_x": ((rows, width), torch.float32), "grad_weight": ((width,), torch.float32)}
    if with_delta:
        outputs["grad_delta"] = ((rows, width), dtype)
    result = simt.program("add_rms_norm", sanitizer, **patches).run(inputs, outputs, schedules=2)
    for name, expected in gradients(torch.float64).items():
        # Beside incoming gradients of about 1: at width 1 those of the norm cancel to nothing.
        error = (result[f"grad_{name}"].double() - expected).abs().max() / max(1, expected.abs().max())
        low = max(TOLERANCE[dtype], TOLERANCE[weight_dtype])
        assert error < (3 * low if name != "x" or weight_dtype != torch.float32 else 1e-5), (
            f"grad_{name}: error {error}"
        )


@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 48), (2, 768), (1, 2050), (130, 40)])
def test_add_rms_norm_backward(simt, dtype, weight_dtype, with_delta, rows, width):
    check_backward(simt, dtype, weight_dtype, rows, width, 0.2 if with_delta else 0.0, with_delta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_several_rows(simt, dtype):
    check_backward(simt, dtype, torch.float32, 2051, 24)


# Blocks of several rows, from few rows.
FEW_BLOCKS = ("add_rms_norm.h", "rows < 1024 ? rows : 1024", "rows < 2 ? rows : 2")


@pytest.mark.slow
@pytest.mark.parametrize("width", [40, 300, 2050])
def test_few_blocks_of_several_rows(simt, width):
    check_backward(simt, torch.float32, torch.float32, 7, width, patches=[FEW_BLOCKS])


@pytest.mark.slow
def test_add_rms_norm_has_no_data_race(simt):
    _, _, inputs = make_case(torch.float32, torch.float32, 2, 300, 0.1)
    simt.program("add_rms_norm", "thread").run(inputs, {"normed": ((2, 300), torch.float32)}, schedules=1)
    check_backward(simt, torch.float32, torch.float32, 5, 300, sanitizer="thread", patches=[FEW_BLOCKS])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "sanitizer", "message"),
    [
        pytest.param("add_rms_norm_cuda.cu", "__syncthreads();\n  sums = scratch[0]", "sums = scratch[0]",
                     "thread", "data race", id="no barrier for a row's sums"),
        pytest.param("add_rms_norm_cuda.cu", "stage ^= 1", "stage ^= 0",
                     "thread", "data race", id="one scratch for all rows"),
        pytest.param("cuda_column_sums.h", "__syncthreads();", "", "thread", "data race", id="no barrier for columns"),
        pytest.param("cuda_column_sums.h", "distance = kSumColumns", "distance = 2 * kSumColumns",
                     "address", "grad_weight: error", id="columns: half of the rows"),
        pytest.param("add_rms_norm_cuda.cu", "value[k] += term;", "value[k] = term;", "address", "sum", id="sum"),
        pytest.param("add_rms_norm_cuda.cu", "keep = b.grad_delta == nullptr ? 0 : keep_bits(p, seed, row, i)",
                     "keep = 0xffu", "address", "grad_delta: error", id="dropout of wide rows"),
        pytest.param("add_rms_norm_cuda.cu", "keep_bits(p, seed, row, first)", "keep_bits(p, seed, blockIdx.x, first)",
                     "address", "grad_delta: error", id="dropout of the block's first row"),
        pytest.param("add_rms_norm_cuda.cu", "shares[k] += write", "shares[k] = write",
                     "address", "grad_weight: error", id="the last row's share alone"),
        pytest.param("add_rms_norm_cuda.cu", "partial[j] + share", "share",
                     "address", "grad_weight: error", id="the last row's share alone, wide rows"),
    ],
)  # fmt: skip
def test_seeded_bugs_are_caught(simt, file, old, new, sanitizer, message):
    patches, width = [(file, old, new), FEW_BLOCKS], 300 if sanitizer == "thread" else 2050
    with pytest.raises(AssertionError, match=message):
        if message == "sum":
            arguments, dropout, inputs = make_case(torch.float32, torch.float32, 2, 48)
            outputs = {"sum": ((2, 48), torch.float32)}
            result = simt.program("add_rms_norm", patches=patches).run(inputs, outputs, schedules=1)
            assert torch.equal(result["sum"], reference(arguments, dropout)[0]), "sum"
        check_backward(simt, torch.float32, torch.float32, 5, width, sanitizer=sanitizer, patches=patches)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 8, 13, 2048, 2049])
def test_swiglu(simt, dtype, size):
    generator = torch.Generator().manual_seed(size)
    gate, up = (4 * torch.randn(2, size, generator=generator)).to(dtype)
    result = simt.program("swiglu").run(
        {"gate": gate, "up": up, "size": size, "dtype": DTYPES.index(dtype)}, {"out": ((size,), dtype)}, schedules=2
    )
    torch.testing.assert_close(result["out"], swiglu_reference(gate, up), rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 8, 2049, 4100])
def test_swiglu_backward(simt, dtype, size):
    generator = torch.Generator().manual_seed(size)
    gate, up, grad = (2 * torch.randn(3, size, generator=generator)).to(dtype).unbind(0)
    result = simt.program("swiglu").run(
        {"dtype": DTYPES.index(dtype), "size": size, "gate": gate, "up": up, "grad": grad, "backward": 1},
        {"grad_gate": ((size,), dtype), "grad_up": ((size,), dtype)},
    )
    leaves = [x.double().requires_grad_() for x in (gate, up)]
    expected = torch.autograd.grad(swiglu_reference(*leaves), leaves, grad.double())
    for name, gradient in zip(("grad_gate", "grad_up"), expected, strict=True):
        torch.testing.assert_close(result[name].double(), gradient, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
