"""int8_linear: native against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F

from alitok_fast._library import use_reference
from alitok_fast.ops.int8_linear import int8_linear, int8_linear_reference, pack_int8, round_groups, unpack_int8
from alitok_fast.testing import EPSILON

DTYPES = [torch.float32, torch.bfloat16]


def make(rows, inputs, outputs, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator)
    return x, weight, torch.randn(outputs, generator=generator) if bias else None


def assert_close(got, x, packed, bias, outputs):
    """Sums in float32: as far from exact ones as the reference's, and rounded to the result's dtype."""
    exact = int8_linear_reference(x, packed, bias, outputs, torch.float64)
    low = int8_linear_reference(x, packed, bias, outputs, torch.float32)
    bound = 3 * (low - exact).abs().max() + 4 * EPSILON[got.dtype] * exact.abs().max()
    assert (got.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (1, 64, 32), (2, 63, 33), (5, 65, 31), (6, 128, 64), (7, 200, 70), (13, 1024, 97), (305, 96, 40)],
)
def test_matches_reference(cpu_isa, dtype, out_dtype, rows, inputs, outputs):
    x, weight, bias = make(rows, inputs, outputs, dtype, bias=rows != 2)
    packed = pack_int8(weight)
    got = int8_linear(x, packed, bias, outputs, out_dtype)
    assert got.dtype == out_dtype and got.shape == (rows, outputs)
    assert_close(got, x, packed, bias, outputs)


def test_decoder_shapes_are_near_the_exact_product(cpu_isa):
    """More rows than are rounded at a time. Both factors are rounded by up to 1/254 of their group's largest."""
    x, weight, bias = make(300, 1024, 96)
    got = int8_linear(x, pack_int8(weight), bias, 96)
    exact = x.double() @ weight.double().T + bias
    assert (got - exact).square().mean().sqrt() < 0.012 * exact.square().mean().sqrt()


def test_reference_path():
    x, weight, bias = make(3, 70, 5)
    with use_reference():
        low = int8_linear(x.view(3, 1, 70), pack_int8(weight), bias, 5)
    assert torch.equal(low.view(3, 5), int8_linear_reference(x, pack_int8(weight), bias, 5, torch.float32))


def test_rows_do_not_depend_on_each_other(cpu_isa):
    x, weight, bias = make(600, 128, 65)
    packed, threads = pack_int8(weight), torch.get_num_threads()
    together = int8_linear(x, packed, bias, 65)
    try:
        for count in (1, 3, 40):  # 40: more threads than panels, which then share blocks
            torch.set_num_threads(count)
            assert torch.equal(int8_linear(x, packed, bias, 65), together)
            assert torch.equal(int8_linear(x[17:20], packed, bias, 65), together[17:20])
    finally:
        torch.set_num_threads(threads)


def test_pack_and_unpack():
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    whole, scale = unpack_int8(pack_int8(weight), 33, 70)
    assert whole.abs().max() == 127 and whole.eq(whole.round()).all()
    assert whole.abs().amax(-1)[:7].eq(127).all()
    restored = (whole * scale[..., None]).flatten(1)
    assert restored[:, 70:].eq(0).all() and restored[7].eq(0).all()
    error = (restored[:, :70] - weight).abs()
    assert (error <= scale.repeat_interleave(64, 1)[:, :70] / 2 * 1.0001).all()
    with pytest.raises(ValueError, match="weight: expected finite numbers"):
        pack_int8(weight / 0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_in_its_row(cpu_isa, bad):
    x, weight, bias = make(8, 100, 40)
    packed = pack_int8(weight)
    clean = int8_linear(x, packed, bias, 40)
    x[3, 80] = bad
    got = int8_linear(x, packed, bias, 40)
    assert got[3].isnan().all()
    others = [row for row in range(8) if row != 3]
    assert torch.equal(got[others], clean[others])


def test_extreme_magnitudes(cpu_isa):
    """Groups of zeros, of numbers too small to divide by, and of the largest ones."""
    x = torch.zeros(4, 64)
    x[1, 0], x[2, 0], x[3, 0] = 1e-40, 3e38, -1e-30
    packed = pack_int8(torch.ones(32, 64) * 0.5)
    got = int8_linear(x, packed, None, 32)
    assert got[:2].eq(0).all()
    torch.testing.assert_close(got[2:, 0], torch.tensor([1.5e38, -5e-31]))
    assert_close(got, x, packed, None, 32)


def test_largest_sums(cpu_isa):
    """127 times 127 everywhere: what the sums of integers must hold."""
    x, weight = torch.ones(6, 128), torch.ones(32, 128)
    x[3:], weight[16:] = -1, -1
    assert torch.equal(int8_linear(x, pack_int8(weight), None, 32), F.linear(x, weight))


def test_round_groups_to_even():
    whole, scale = round_groups(torch.tensor([[127.0, 0.5, 1.5, -2.5, *[0.0] * 60]]))
    assert scale == 1 and whole[0, 0, :4].tolist() == [127, 0, 2, -2]


def test_empty():
    x, weight, bias = make(3, 16, 4)
    packed = pack_int8(weight)
    assert int8_linear(x[:0], packed, bias, 4).shape == (0, 4)
    assert int8_linear(x, pack_int8(weight[:0]), None, 0).shape == (3, 0)
    assert torch.equal(int8_linear(x[:, :0], pack_int8(weight[:, :0]), bias, 4), bias.expand(3, 4))


def test_gradients_are_refused():
    x, weight, bias = make(3, 16, 4)
    out = int8_linear(x.requires_grad_(), pack_int8(weight), bias, 4)
    with pytest.raises(RuntimeError, match="int8_linear: expected inputs without gradients"):
        out.sum().backward()


def test_opcheck():
    operator = torch.ops.alitok.int8_linear.default
    x, weight, bias = make(3, 20, 4, torch.bfloat16)
    torch.library.opcheck(operator, (x, pack_int8(weight), bias, 4, torch.bfloat16))
    torch.library.opcheck(operator, (x.float(), pack_int8(weight), None, 4, torch.float32))


def misaligned(packed):
    return torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].view(packed.shape).copy_(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"x": a["x"].half()}, "x: expected float32 or bfloat16, got float16"),
        (lambda a: a | {"x": torch.ones(3, 65)}, "weight: expected size 2 along dimension 1"),
        (lambda a: a | {"weight": torch.ones(4, 16)}, "weight: expected uint8, got float32"),
        (lambda a: a | {"weight": a["weight"][..., :64]}, "weight: expected size 2176 along dimension 2"),
        (lambda a: a | {"weight": misaligned(a["weight"])}, "weight: expected data aligned to 64 bytes"),
        (lambda a: a | {"outputs": 33}, "weight: expected size 2 along dimension 0"),
        (lambda a: a | {"outputs": -1}, "outputs: expected at least 0, got -1"),
        (lambda a: a | {"bias": torch.ones(4).bfloat16()}, "bias: expected float32, got bfloat16"),
        (lambda a: a | {"bias": torch.ones(3)}, "bias: expected size 4 along dimension 0"),
        (lambda a: a | {"dtype": torch.float16}, "dtype: expected float32 or bfloat16, got float16"),
    ],
)
def test_messages(change, message):
    x, weight, bias = make(3, 16, 4)
    arguments = {"x": x, "weight": pack_int8(weight), "bias": bias, "outputs": 4}
    with pytest.raises(ValueError, match=message):
        int8_linear(**change(arguments))
