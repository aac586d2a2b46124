"""bf16_linear: native against the reference in float64. What stands around it, for int8_linear too."""

import pytest
import torch
import torch.nn.functional as F

from alitok_fast._library import use_reference
from alitok_fast.ops.bf16_linear import bf16_linear, bf16_linear_reference, pack_bf16, unpack_bf16
from alitok_fast.ops.int8_linear import int8_linear, int8_linear_reference, pack_int8
from alitok_fast.ops.packed_linear import RowNorm
from alitok_fast.testing import EPSILON

DTYPES = [torch.float32, torch.bfloat16]
FORMATS = {
    "bf16": (bf16_linear, bf16_linear_reference, pack_bf16),
    "int8": (int8_linear, int8_linear_reference, pack_int8),
}


def make(rows, inputs, outputs, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator)
    return x, weight, torch.randn(outputs, generator=generator) if bias else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 1, 1),
        (1, 64, 32),
        (2, 63, 33),
        (5, 65, 31),
        (33, 128, 64),
        (70, 200, 70),
        (13, 1024, 97),
        (600, 96, 40),
        (600, 1700, 33),
    ],
)
def test_matches_reference(cpu_isa, dtype, out_dtype, rows, inputs, outputs):
    x, weight, bias = make(rows, inputs, outputs, dtype, bias=rows != 2)
    packed = pack_bf16(weight)
    got = bf16_linear(x, packed, bias, outputs, out_dtype)
    assert got.dtype == out_dtype and got.shape == (rows, outputs)
    exact = bf16_linear_reference(x, packed, bias, outputs, torch.float64)
    bound = (4 * EPSILON[torch.float32] * inputs**0.5 + 2 * EPSILON[out_dtype]) * exact.abs().max()
    assert (got.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("parts", ["norm", "gelu", "residual", "norm gelu residual"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (7, 70, 45), (40, 192, 96)])
def test_what_stands_around_the_product(cpu_isa, name, parts, rows, inputs, outputs):
    operator, reference, pack = FORMATS[name]
    x, weight, bias = make(rows, inputs, outputs)
    generator = torch.Generator().manual_seed(1)
    norm = residual = None
    if "norm" in parts:
        norm = RowNorm(1 + 0.1 * torch.randn(inputs, generator=generator), torch.randn(inputs, generator=generator))
        x = 3 * x + 5
    if "residual" in parts:
        residual = torch.randn(rows, outputs, generator=generator)
    packed, gelu = pack(weight), "gelu" in parts
    got = operator(x, packed, bias, outputs, norm=norm, gelu=gelu, residual=residual)
    ends = (*(norm or (None, None, 1e-5)), gelu, residual)
    exact = reference(x, packed, bias, outputs, torch.float64, *ends)
    # A norm that differs in its last bit is rounded the other way here and there.
    bound = 2e-2 if norm is not None else 1e-5
    assert (got.double() - exact).abs().max() <= bound * exact.abs().max().clamp(min=1)
    assert (got.double() - exact).square().mean().sqrt() <= 0.1 * bound * exact.abs().max().clamp(min=1)


def test_gelu_is_the_exact_one(cpu_isa):
    x = torch.linspace(-8, 8, 4001)[:, None].bfloat16().float()
    got = bf16_linear(x, pack_bf16(torch.ones(1, 1)), None, 1, gelu=True)
    torch.testing.assert_close(got.double(), F.gelu(x.double()), rtol=0, atol=2e-6)
    ends = torch.tensor([[torch.inf], [torch.nan]])
    got = bf16_linear(ends, pack_bf16(torch.ones(1, 1)), None, 1, gelu=True)
    assert got[0] == torch.inf and got[1].isnan()


@pytest.mark.parametrize("name", FORMATS)
def test_large_results_are_the_same(cpu_isa, name):
    """Those from 2 MiB on are written past the caches."""
    operator, _, pack = FORMATS[name]
    x, weight, bias = make(700, 64, 1024)
    packed = pack(weight)
    for dtype in DTYPES:
        together = operator(x, packed, bias, 1024, dtype)
        assert torch.equal(operator(x[300:340], packed, bias, 1024, dtype), together[300:340])


def test_reference_path():
    x, weight, bias = make(3, 70, 5)
    with use_reference():
        low = bf16_linear(x.view(3, 1, 70), pack_bf16(weight), bias, 5)
    assert torch.equal(low.view(3, 5), bf16_linear_reference(x, pack_bf16(weight), bias, 5, torch.float32))


def test_rows_do_not_depend_on_each_other(cpu_isa):
    x, weight, bias = make(600, 128, 65)
    packed, threads = pack_bf16(weight), torch.get_num_threads()
    together = bf16_linear(x, packed, bias, 65)
    try:
        for count in (1, 3, 40):
            torch.set_num_threads(count)
            assert torch.equal(bf16_linear(x, packed, bias, 65), together)
            assert torch.equal(bf16_linear(x[17:20], packed, bias, 65), together[17:20])
    finally:
        torch.set_num_threads(threads)


def test_pack_and_unpack():
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(0))
    packed = pack_bf16(weight)
    assert packed.shape == (2, 3, 1024) and packed.dtype == torch.bfloat16
    assert torch.equal(unpack_bf16(packed, 33, 70), weight.bfloat16())
    assert packed.ne(0).sum() == weight.bfloat16().ne(0).sum()  # what fills it up is zero


def test_empty():
    x, weight, bias = make(3, 16, 4)
    packed = pack_bf16(weight)
    assert bf16_linear(x[:0], packed, bias, 4).shape == (0, 4)
    assert bf16_linear(x, pack_bf16(weight[:0]), None, 0).shape == (3, 0)
    assert torch.equal(bf16_linear(x[:, :0], pack_bf16(weight[:, :0]), bias, 4), bias.expand(3, 4))


def test_gradients_are_refused():
    x, weight, bias = make(3, 16, 4)
    out = bf16_linear(x.requires_grad_(), pack_bf16(weight), bias, 4)
    with pytest.raises(RuntimeError, match="bf16_linear: expected inputs without gradients"):
        out.sum().backward()


def test_opcheck():
    operator = torch.ops.alitok.bf16_linear.default
    x, weight, bias = make(3, 20, 4, torch.bfloat16)
    torch.library.opcheck(operator, (x, pack_bf16(weight), bias, 4, torch.bfloat16))
    ends = (torch.ones(20), torch.zeros(20), 1e-5, True, torch.ones(3, 4))
    torch.library.opcheck(operator, (x.float(), pack_bf16(weight), None, 4, torch.float32, *ends))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"x": a["x"].half()}, "x: expected float32 or bfloat16, got float16"),
        (lambda a: a | {"x": torch.ones(3, 33)}, "weight: expected size 2 along dimension 1"),
        (lambda a: a | {"weight": torch.ones(4, 16)}, "weight: expected bfloat16, got float32"),
        (lambda a: a | {"outputs": 33}, "weight: expected size 2 along dimension 0"),
        (lambda a: a | {"outputs": -1}, "outputs: expected at least 0, got -1"),
        (lambda a: a | {"bias": torch.ones(3)}, "bias: expected size 4 along dimension 0"),
        (lambda a: a | {"dtype": torch.float16}, "dtype: expected float32 or bfloat16, got float16"),
        (lambda a: a | {"norm": RowNorm(torch.ones(15), torch.ones(16))}, "norm_weight: expected size 16"),
        (lambda a: a | {"norm": RowNorm(torch.ones(16), None)}, "norm_bias: expected a tensor exactly where"),
        (lambda a: a | {"norm": RowNorm(torch.ones(16), torch.ones(16), -1.0)}, "norm_eps: expected a number >= 0"),
        (lambda a: a | {"residual": torch.ones(3, 5)}, r"residual: expected shape \(3, 4\), got \(3, 5\)"),
        (lambda a: a | {"residual": torch.ones(3, 4).half()}, "residual: expected float32, got float16"),
        (
            lambda a: a | {"residual": torch.ones(3, 4), "dtype": torch.bfloat16},
            "dtype: expected float32 with a residual, got bfloat16",
        ),
    ],
)
def test_messages(change, message):
    x, weight, bias = make(3, 16, 4)
    arguments = {"x": x, "weight": pack_bf16(weight), "bias": bias, "outputs": 4}
    with pytest.raises(ValueError, match=message):
        bf16_linear(**change(arguments))
