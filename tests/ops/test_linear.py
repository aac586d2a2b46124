"""linear: native against the reference in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from alitok_fast._library import use_reference
from alitok_fast.models.layers import Linear
from alitok_fast.ops.linear import linear, linear_reference, mixed_linear
from alitok_fast.testing import EPSILON

BF16 = torch.bfloat16
SHAPES = [(1, 1, 1), (2, 33, 31), (33, 70, 45), (31, 32, 64), (70, 200, 97), (3100, 40, 33), (70, 1600, 33)]


def make(rows, inputs, outputs, weight_dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(rows, inputs, generator=generator).to(BF16)
    weight = torch.randn(outputs, inputs, generator=generator).to(weight_dtype)
    bias = torch.randn(outputs, generator=generator)
    return x, weight, bias, torch.randn(rows, outputs, generator=generator).to(BF16)


def assert_close(got, exact, terms):
    """Sums of `terms` products in float32, rounded once to the dtype of the result."""
    bound = (4 * EPSILON[torch.float32] * terms**0.5 + 2 * EPSILON[got.dtype]) * exact.abs().max() + 1e-30
    assert (got.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("weight_dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_matches_reference(cpu_isa, weight_dtype, rows, inputs, outputs):
    x, weight, bias, direction = make(rows, inputs, outputs, weight_dtype)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    out = linear(*leaves)
    gradients = torch.autograd.grad(out, leaves, direction)
    exact = [x.detach().double(), weight.detach().to(BF16).double(), bias.detach().double()]
    for leaf in exact:
        leaf.requires_grad_()
    right = linear_reference(*exact)
    expected = torch.autograd.grad(right, exact, direction.double())
    assert out.dtype == BF16 and [g.dtype for g in gradients] == [BF16, weight_dtype, torch.float32]
    assert_close(out, right, inputs)
    for got, wanted, terms in zip(gradients, expected, (outputs, rows, rows), strict=True):
        assert_close(got, wanted, terms)


def test_reference_path():
    x, weight, bias, _ = make(3, 70, 5)
    with use_reference():
        assert torch.equal(linear(x.view(3, 1, 70), weight, bias).view(3, 5), linear_reference(x, weight, bias))


def test_gradients_of_weights_are_not_rounded_to_bfloat16():
    x, weight, bias, direction = make(300, 64, 32)
    (gradient,) = torch.autograd.grad(linear(x, weight.requires_grad_(), bias), weight, direction)
    exact = direction.double().T @ x.double()
    assert (gradient - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_wanted(cpu_isa, wanted):
    x, weight, bias, direction = make(40, 50, 60)
    leaves = [x, weight, bias]
    everything = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(linear(*everything), everything, direction)
    some = [leaf.clone().requires_grad_(index in wanted) for index, leaf in enumerate(leaves)]
    found = torch.autograd.grad(linear(*some), [some[index] for index in wanted], direction)
    for index, gradient in zip(wanted, found, strict=True):
        assert torch.equal(gradient, expected[index])


def test_threads_change_no_bit(cpu_isa):
    x, weight, bias, direction = make(600, 65, 130)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]

    def everything():
        out = linear(*leaves)
        return [out, *torch.autograd.grad(out, leaves, direction)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = everything()
    try:
        for count in (2, 3, 40):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_in_its_row(cpu_isa):
    x, weight, bias, _ = make(40, 50, 33)
    clean = linear(x, weight, bias)
    x[7, 3] = torch.nan
    got = linear(x, weight, bias)
    assert got[7].isnan().all()
    others = [row for row in range(40) if row != 7]
    assert torch.equal(got[others], clean[others])


def test_empty(cpu_isa):
    x, weight, bias, _ = make(3, 16, 4)
    assert linear(x[:0], weight, bias).shape == (0, 4)
    assert linear(x, weight[:0]).shape == (3, 0)
    assert torch.equal(linear(x[:, :0], weight[:, :0], bias), bias.to(BF16).expand(3, 4))
    leaves = [x[:0].clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    gradients = torch.autograd.grad(linear(*leaves), leaves, torch.ones(0, 4, dtype=BF16))
    assert [g.shape for g in gradients] == [(0, 16), (4, 16), (4,)] and not any(g.any() for g in gradients)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("inputs", [0, 16])
@pytest.mark.parametrize("outputs", [0, 4])
def test_gradients_of_empty_sizes(cpu_isa, rows, inputs, outputs):
    grad, x = torch.ones(rows, outputs, dtype=BF16), torch.ones(rows, inputs, dtype=BF16)
    found = torch.ops.alitok.linear_backward(grad, x, torch.ones(outputs, inputs), [True, True, True])
    expected = [torch.full((rows, inputs), outputs), torch.full((outputs, inputs), rows), torch.full((outputs,), rows)]
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


def test_opcheck():
    x, weight, bias, direction = make(5, 20, 4)
    torch.library.opcheck(torch.ops.alitok.linear.default, (x.requires_grad_(), weight.requires_grad_(), bias))
    arguments = (direction, x.detach(), weight.detach())
    torch.library.opcheck(torch.ops.alitok.linear_backward.default, (*arguments, [True, True, True]))
    torch.library.opcheck(torch.ops.alitok.linear_backward.default, (*arguments, [False, True, False]))


def test_second_derivatives_are_refused():
    x, weight, bias, _ = make(3, 8, 4)
    (gradient,) = torch.autograd.grad(linear(x.requires_grad_(), weight, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear: expected to be differentiated once"):
        gradient.float().square().sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"x": a["x"].half()}, "x: expected bfloat16, got float16"),
        (lambda a: a | {"weight": a["weight"].half()}, "weight: expected float32 or bfloat16, got float16"),
        (lambda a: a | {"weight": a["weight"][:, 1:]}, "weight: expected size 16 along dimension 1"),
        (lambda a: a | {"weight": a["weight"][0]}, "weight: expected 2 dimensions"),
        (lambda a: a | {"bias": a["bias"][1:]}, "bias: expected size 4 along dimension 0"),
        (lambda a: a | {"bias": a["bias"].double()}, "bias: expected float32, got float64"),
        (lambda a: a | {"weight": a["weight"].to("meta")}, "weight: expected the device of x, cpu, got meta"),
    ],
)
def test_messages(change, message):
    x, weight, bias, _ = make(3, 16, 4)
    with pytest.raises(ValueError, match=message):
        linear(**change({"x": x, "weight": weight, "bias": bias}))


# ---- where the models' layers use it ----


@pytest.fixture
def calls(monkeypatch):
    """The calls of the native operator; empty where torch's function runs."""
    import sys

    made = []
    module = sys.modules["alitok_fast.ops.linear"]
    monkeypatch.setattr(module, "FAST", True)
    original = module.linear
    monkeypatch.setattr(module, "linear", lambda *a: made.append(a) or original(*a))
    return made


def test_a_layer_in_autocast_is_linear(calls):
    layer, x = Linear(16, 8), torch.randn(2, 3, 16)
    with torch.autocast("cpu", BF16):
        out = layer(x)
    assert len(calls) == 1 and out.dtype == BF16 and out.shape == (2, 3, 8)
    assert torch.equal(out, linear(x, layer.weight, layer.bias))


def test_a_layer_in_float32_is_torchs(calls):
    layer, x = Linear(16, 8), torch.randn(3, 16)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == torch.float16
    with torch.autocast("cpu", BF16), use_reference():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert calls == []


def test_a_bfloat16_layer_is_linear(calls):
    layer, x = Linear(16, 8).to(BF16), torch.randn(3, 16).to(BF16)
    assert layer(x).dtype == BF16 and len(calls) == 1


def test_derivatives_of_torch_func_are_torchs(calls):
    layer, x = Linear(16, 8).to(BF16), torch.randn(3, 16).to(BF16)
    gradient = torch.func.grad(lambda x: mixed_linear(x, layer.weight, layer.bias).float().sum())(x)
    assert gradient.shape == x.shape and calls == []
