"""swiglu: native against the reference, forward and backward."""

import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.ops.swiglu import swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 17), (2, 2048)])
def test_swiglu(target, dtype, shape):
    generator = torch.Generator().manual_seed(len(shape))
    gate, up = (4 * torch.randn(2, *shape, generator=generator)).to(target, dtype)
    up = up.clone()  # a view of an odd size is not aligned, which CUDA refuses
    got = swiglu(gate, up)
    with use_reference():
        torch.testing.assert_close(got, swiglu(gate, up), rtol=TOLERANCE[dtype], atol=1e-6)


def test_swiglu_at_the_ends_of_the_range(device):
    gate = torch.tensor([-200.0, -88.0, 0.0, 88.0, 200.0, torch.inf], device=device)
    assert torch.allclose(swiglu(gate, torch.ones_like(gate)), torch.nn.functional.silu(gate), rtol=1e-5)
    assert swiglu(torch.full((1,), torch.nan, device=device), torch.ones(1, device=device)).isnan().all()


@pytest.mark.device
def test_misaligned_view_is_refused_on_cuda(cuda):
    x = torch.ones(9, device=cuda)
    with pytest.raises(ValueError, match="up: expected memory aligned to 16 bytes"):
        swiglu(x[:8], x[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 17), (2, 2048)])
def test_gradients(target, dtype, shape):
    device = target
    generator = torch.Generator().manual_seed(5)
    gate, up, direction = (x.clone() for x in (4 * torch.randn(3, *shape, generator=generator)).to(device, dtype))
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    found = torch.autograd.grad(swiglu(*leaves), leaves, direction)
    with use_reference():
        exact = [t.detach().double().requires_grad_() for t in leaves]
        expected = torch.autograd.grad(swiglu(*exact), exact, direction.double())
    for own, right in zip(found, expected, strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), right, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_second_derivatives(device):
    x = torch.linspace(-6, 6, 50, device=device).requires_grad_()

    def second() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(swiglu(x, 2 * x).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    found = second()
    with use_reference():
        torch.testing.assert_close(found, second(), rtol=1e-5, atol=1e-5)


def test_opcheck(device):
    x = torch.randn(3, 40, device=device)
    torch.library.opcheck(torch.ops.alitok.swiglu.default, (x, x.clone()))
    leaves = (x.clone().requires_grad_(), x.clone().requires_grad_())
    torch.library.opcheck(torch.ops.alitok.swiglu.default, leaves)
    torch.library.opcheck(torch.ops.alitok.swiglu_backward.default, (x.clone(), *leaves))


def test_the_gradients_operator_checks_its_arguments():
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"grad: expected shape \(3, 8\), got \(1, 8\)"):
        torch.ops.alitok.swiglu_backward(x[:1], x, x)
    with pytest.raises(ValueError, match="grad: expected float32, got float16"):
        torch.ops.alitok.swiglu_backward(x.half(), x, x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: swiglu(x, x[:1]), ValueError, r"up: expected shape \(3, 8\), got (shape|\(1, 8\))"),
        (lambda x: swiglu(x.T, x.T), ValueError, "gate: expected a contiguous tensor"),
        (lambda x: swiglu(x.double(), x), ValueError, "gate: expected float32 or bfloat16 or float16, got float64"),
        (lambda x: swiglu(x, x.half()), ValueError, "up: expected float32, got float16"),
        (lambda x: swiglu(x, x.to("meta")), ValueError, "up: expected the device of gate, cpu, got meta"),
        (lambda x: swiglu([1.0], x), TypeError, "gate: expected a tensor, got list"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3, 8))
