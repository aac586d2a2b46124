"""add_rms_norm and swiglu: native against the references."""

import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.swiglu import swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (5, 17), (3, 768), (2, 1280)])
def test_add_rms_norm(target, dtype, with_delta, rows, width):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator).to(target)
    delta = torch.randn(rows, width, generator=generator).to(target, dtype) if with_delta else None
    weight = (1 + 0.1 * torch.randn(width, generator=generator)).to(target, dtype)
    total, normed = add_rms_norm(x, delta, weight)
    with use_reference():
        expected_total, expected = add_rms_norm(x, delta, weight)
    assert torch.equal(total, expected_total) and (with_delta or total is x)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


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


def test_misaligned_view_is_refused_on_cuda(cuda):
    x = torch.ones(9, device=cuda)
    with pytest.raises(ValueError, match="up: expected memory aligned to 16 bytes"):
        swiglu(x[:8], x[1:])


def test_opcheck(device):
    x, weight = torch.randn(3, 40, device=device), torch.randn(40, device=device)
    torch.library.opcheck(torch.ops.alitok.add_rms_norm.default, (x, torch.randn_like(x), weight, 1e-5))
    torch.library.opcheck(torch.ops.alitok.add_rms_norm.default, (x, None, weight.bfloat16(), 1e-5))
    torch.library.opcheck(torch.ops.alitok.swiglu.default, (x, x.clone()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: add_rms_norm(x.half(), None, w), "x: expected float32, got float16"),
        (lambda x, w: add_rms_norm(x[0], None, w), "x: expected 2 dimensions"),
        (lambda x, w: add_rms_norm(x, x.half(), w), "delta: expected float32, got float16"),
        (lambda x, w: add_rms_norm(x, x[:1], w), "delta: expected size 3 along dimension 0"),
        (lambda x, w: add_rms_norm(x, None, w[:5]), "weight: expected size 8 along dimension 0"),
        (lambda x, w: swiglu(x, x[:1]), r"up: expected shape \(3, 8\), got (shape|\(1, 8\))"),
        (lambda x, w: swiglu(x.T, x.T), "gate: expected a contiguous tensor"),
    ],
)
def test_messages(call, message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        call(torch.ones(3, 8), torch.ones(8))
