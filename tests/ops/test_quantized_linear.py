"""quantized_linear: native against the reference in float64."""

import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.ops.quantized_linear import (
    GROUP_INPUTS,
    LARGEST,
    MOST_ROWS,
    dequantize_weight,
    quantize_weight,
    quantized_linear,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
WEIGHTS = pytest.mark.parametrize("weight_dtype", list(LARGEST), ids=["int8", "e4m3"])


def make(rows, inputs, outputs, dtype=torch.float32, weight_dtype=torch.int8, bias=True, device="cpu"):
    generator = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
    wide = torch.randn(outputs, inputs, generator=generator)
    wide *= 4.0 ** -(torch.arange(inputs) // GROUP_INPUTS % 3)  # another group's scale would show
    weight, scale = quantize_weight(wide, weight_dtype)
    added = torch.randn(outputs, generator=generator).to(device, dtype) if bias else None
    return x, weight.to(device), scale.to(device), added


def exact(x, weight, scale, bias):
    groups = torch.arange(x.shape[1], device=x.device) // GROUP_INPUTS
    out = x.double() @ (weight.double() * scale.double()[:, groups]).T
    return out if bias is None else out + bias.double()


def assert_close(got, arguments, multiple=3):
    expected = exact(*arguments)
    with use_reference():
        low = quantized_linear(*arguments).double()
    bound = multiple * (low - expected).abs().max() + 4 * UNIT[got.dtype] * expected.abs().max()
    assert (got.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@WEIGHTS
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (1, 768, 2304), (2, 16, 3), (3, 17, 5), (5, 88, 32), (8, 520, 9), (16, 2048, 70), (MOST_ROWS, 48, 7)],
)
def test_matches_reference(target, dtype, weight_dtype, rows, inputs, outputs):
    arguments = make(rows, inputs, outputs, dtype, weight_dtype, bias=rows != 2, device=target)
    got = quantized_linear(*arguments)
    assert got.dtype == dtype and got.shape == (rows, outputs)
    assert_close(got, arguments)


@WEIGHTS
def test_many_rows_go_through_a_matrix_product(device, weight_dtype):
    x, weight, scale, bias = make(2 * MOST_ROWS, 40, 6, torch.float32, weight_dtype, device=device)
    many = quantized_linear(x, weight, scale, bias)
    few = torch.cat([quantized_linear(part, weight, scale, bias) for part in x.split(MOST_ROWS)])
    torch.testing.assert_close(many, few, rtol=1e-5, atol=1e-5)
    shaped = quantized_linear(x.view(2, MOST_ROWS, 40), weight, scale, bias)
    assert torch.equal(shaped, many.view(2, MOST_ROWS, 6))


def test_rows_do_not_depend_on_each_other(device):
    """Which images share a batch changes none of them beyond rounding."""
    x, weight, scale, bias = make(16, 96, 33, torch.bfloat16, device=device)
    together = quantized_linear(x, weight, scale, bias)
    for rows in (1, 2, 5):
        torch.testing.assert_close(
            quantized_linear(x[:rows], weight, scale, bias), together[:rows], rtol=2**-7, atol=1e-6
        )


@WEIGHTS
def test_every_code(target, weight_dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(weight_dtype)
    codes = codes[codes.float().isfinite()][:, None].contiguous()
    scale = torch.ones(len(codes), 1, dtype=torch.bfloat16, device=target)
    got = quantized_linear(torch.ones(1, 1, device=target), codes.to(target), scale)
    assert torch.equal(got.flatten().cpu(), codes.flatten().float())


@WEIGHTS
@pytest.mark.parametrize("inputs", [1, 64, 150])
def test_quantize_weight(weight_dtype, inputs):
    weight = torch.randn(50, inputs, generator=torch.Generator().manual_seed(0))
    weight[:, :64] *= 100
    weight[7], weight[8] = 0, 1e-40
    quantised, scale = quantize_weight(weight, weight_dtype)
    assert quantised.dtype == weight_dtype and quantised.is_contiguous()
    assert scale.dtype == torch.bfloat16 and scale.shape == (50, -(-inputs // GROUP_INPUTS))
    assert torch.equal(quantised[7].float(), torch.zeros(inputs))
    largest = LARGEST[weight_dtype]
    for group, (whole, exact) in enumerate(zip(*(t.split(GROUP_INPUTS, 1) for t in (quantised, weight)), strict=True)):
        of_group = scale[:, group, None].float()
        # Rounded up by less than a unit of bfloat16: nothing is cut off, and nearly all of the range is used.
        assert (of_group * largest >= exact.abs().amax(1, keepdim=True)).all()
        assert (whole.float().abs().amax(1)[:7] >= largest * (1 - 2**-4)).all()
        error = (whole.float() * of_group - exact).abs()
        step = of_group / 2
        if weight_dtype == torch.float8_e4m3fn:  # half a unit of four significant bits, of subnormals near zero
            step = (exact.abs() * 2**-4).maximum(of_group * 2**-10)
        assert (error <= step * 1.0001).all()
    written_out = dequantize_weight(quantised, scale, torch.float64)
    assert torch.equal(dequantize_weight(quantised, scale).double(), written_out)  # exact


def test_quantize_weight_refuses_other_dtypes():
    with pytest.raises(ValueError, match="dtype: expected int8 or float8_e4m3fn, got int16"):
        quantize_weight(torch.ones(2, 2), torch.int16)


def test_misaligned_weight(target):
    """A view may begin anywhere."""
    x, weight, scale, _ = make(2, 32, 4, device=target)
    moved = torch.empty(4 * 32 + 3, dtype=torch.int8, device=target)[3:].view(4, 32).copy_(weight)
    assert torch.equal(quantized_linear(x, moved, scale), quantized_linear(x, weight, scale))


def test_empty(device):
    x, weight, scale, bias = make(3, 16, 4, device=device)
    assert quantized_linear(x[:0], weight, scale, bias).shape == (0, 4)
    assert quantized_linear(x, weight[:0], scale[:0]).shape == (3, 0)
    assert torch.equal(quantized_linear(x[:, :0], weight[:, :0].contiguous(), scale[:, :0], bias), bias.expand(3, 4))


def test_gradients_are_refused():
    x, weight, scale, bias = make(3, 16, 4)
    out = quantized_linear(x.requires_grad_(), weight, scale, bias)
    with pytest.raises(RuntimeError, match="quantized_linear: expected inputs without gradients"):
        out.sum().backward()


def test_opcheck(device):
    operator = torch.ops.alitok.quantized_linear.default
    torch.library.opcheck(operator, make(3, 20, 4, torch.bfloat16, device=device))
    torch.library.opcheck(operator, make(1, 16, 4, bias=False, device=device))
    # The other checks compare inputs by torch.allclose, which this dtype has not.
    inputs = make(3, 20, 4, torch.bfloat16, torch.float8_e4m3fn, device=device)
    torch.library.opcheck(operator, inputs, test_utils=("test_autograd_registration", "test_faketensor"))


def test_opcheck_of_the_widening(cuda):
    operator = torch.ops.alitok.quantized_linear_widen.default
    _, weight, scale, _ = make(1, 150, 4, device=cuda)
    for dtype in DTYPES:
        torch.library.opcheck(operator, (weight, scale, dtype))
    with pytest.raises(ValueError, match="dtype: expected float32 or bfloat16 or float16, got float64"):
        operator(weight, scale, torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 16).double()}, "x: expected float32 or bfloat16 or float16, got float64"),
        ({"x": torch.ones(3, 8)}, "weight: expected size 8 along dimension 1"),
        ({"weight": torch.ones(4, 16)}, "weight: expected int8 or .*, got float32"),
        ({"weight": torch.ones(16, 4, dtype=torch.int8).T}, "weight: expected a contiguous tensor"),
        ({"scale": torch.ones(4).bfloat16()}, "scale: expected 2 dimensions"),
        ({"scale": torch.ones(5, 1).bfloat16()}, "scale: expected size 4 along dimension 0"),
        ({"scale": torch.ones(4, 2).bfloat16()}, "scale: expected size 1 along dimension 1"),
        ({"scale": torch.ones(4, 1)}, "scale: expected bfloat16, got float32"),
        ({"bias": torch.ones(4).half()}, "bias: expected float32, got float16"),
        ({"bias": torch.ones(3)}, "bias: expected size 4 along dimension 0"),
    ],
)
def test_messages(change, message):
    arguments = dict(zip(("x", "weight", "scale", "bias"), make(3, 16, 4), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        quantized_linear(**arguments)
