"""The CUDA kernel of quantized_linear, emulated, against the reference."""

import pytest
import torch

from alitok_fast.ops.quantized_linear import dequantize_weight, quantize_weight, quantized_linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def check(simt, dtype, weight_dtype, rows, inputs, outputs, bias=True, offset=0, sanitizer="address", patches=()):
    generator = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    wide = torch.randn(outputs, inputs, generator=generator)
    wide *= 4.0 ** -(torch.arange(inputs) // 64 % 3)  # another group's scale would show
    weight, scale = quantize_weight(wide, weight_dtype)
    added = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    stored = torch.cat([torch.full((offset,), 99, dtype=torch.uint8), weight.flatten().view(torch.uint8)])
    case = {"x": x, "weight": stored, "scale": scale, "bias": added, "offset": offset}
    case |= {"rows": rows, "inputs": inputs, "outputs": outputs}
    case |= {"dtype": DTYPES.index(dtype), "weight_dtype": DTYPES.index(weight_dtype)}
    program = simt.program("quantized_linear", sanitizer, patches)
    got = program.run(case, {"out": ((rows, outputs), dtype)}, schedules=2)["out"].double()
    exact = quantized_linear_reference(*(None if t is None else t.double() for t in (x, weight, scale, added)))
    error = (got - exact).abs().max() / exact.abs().max()
    assert error <= TOLERANCE[dtype], f"out: error {error:.3g}"


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES[3:], ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (1, 768, 9), (2, 544, 5), (3, 33, 6), (8, 64, 9), (7, 40, 3), (16, 528, 17), (19, 48, 8)],
)
def test_matches_reference(simt, dtype, weight_dtype, rows, inputs, outputs):
    check(simt, dtype, weight_dtype, rows, inputs, outputs, bias=outputs != 5)


@pytest.mark.parametrize("offset", [1, 8])
def test_misaligned_weight(simt, offset):
    check(simt, torch.bfloat16, torch.int8, 2, 64, 5, offset=offset)


def check_widen(simt, dtype, weight_dtype, inputs, outputs, offset=0, patches=()):
    generator = torch.Generator().manual_seed(inputs + outputs)
    wide = torch.randn(outputs, inputs, generator=generator) * 4.0 ** -(torch.arange(inputs) // 64 % 3)
    weight, scale = quantize_weight(wide, weight_dtype)
    stored = torch.cat([torch.full((offset,), 99, dtype=torch.uint8), weight.flatten().view(torch.uint8)])
    case = {"rows": 0, "weight": stored, "scale": scale, "offset": offset, "inputs": inputs, "outputs": outputs}
    case |= {"dtype": DTYPES.index(dtype), "weight_dtype": DTYPES.index(weight_dtype)}
    program = simt.program("quantized_linear", patches=patches)
    got = program.run(case, {"wide": ((outputs, inputs), dtype)}, schedules=2)["wide"]
    assert torch.equal(got, dequantize_weight(weight, scale).to(dtype)), "wide: other bits"


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES[3:], ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "offset"), [(1, 1, 0), (64, 4, 0), (768, 5, 0), (1040, 3, 0), (77, 6, 0), (64, 3, 1)]
)
def test_weights_written_out(simt, dtype, weight_dtype, inputs, outputs, offset):
    check_widen(simt, dtype, weight_dtype, inputs, outputs, offset)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if (output >= p.outputs) return;", ""),
        ("scale[i / kQuantizedLinearGroup]", "scale[0]"),
        ("(p.scale) + output * groups;", "(p.scale) + groups;"),
        ("if (e < count) out[i + e]", "out[i + e]"),
        ("const bool out_aligned = whole && is_aligned(p.out);", "const bool out_aligned = true;"),
    ],
)
def test_seeded_bugs_of_the_widening_are_caught(simt, old, new):
    with pytest.raises(AssertionError, match="^(exit code|wide: other bits)"):
        for inputs in (1040, 77):
            check_widen(simt, torch.bfloat16, torch.int8, inputs, 5, patches=[("quantized_linear_cuda.cu", old, new)])


@pytest.mark.slow
def test_has_no_data_race(simt):
    check(simt, torch.bfloat16, torch.float8_e4m3fn, 9, 80, 11, sanitizer="thread")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("exists ? count : 0", "count", "exit code"),
        ("i += 32 * kVector", "i += 16 * kVector", "exit code"),
        ("scale += 32 * kVector / kQuantizedLinearGroup", "scale += 32 / kVector", "out: error"),
        ("lane * kVector / kQuantizedLinearGroup;", "0;", "out: error"),
        ("scale[o * groups]", "scale[0]", "out: error"),
        ("exists ? to_float(", "true ? to_float(", "exit code"),
        ("e < count ? to_float(from[e]) : 0.0f", "to_float(from[e])", "exit code"),
    ],
)
def test_seeded_bugs_are_caught(simt, old, new, message):
    with pytest.raises(AssertionError, match=message):
        patches = [("quantized_linear_cuda.cu", old, new)]
        check(simt, torch.float32, torch.int8, 8, 40 if "count" in old else 1040, 5, patches=patches)
