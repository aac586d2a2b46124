"""add_rms_norm: native against the reference, forward and backward."""

import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.dropout import keep_mask

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


def sum_normed_and_gradients(x, delta, weight, dropout, seed):
    """Both results, and the gradients of random projections of them."""
    inputs = [t.detach().requires_grad_() for t in (x, delta, weight) if t is not None]
    results = add_rms_norm(inputs[0], inputs[1] if delta is not None else None, inputs[-1], 1e-5, dropout, seed)
    generator = torch.Generator().manual_seed(9)
    directions = [torch.randn(r.shape, generator=generator).to(r.device, r.dtype) for r in results]
    return [*results, *torch.autograd.grad(results, inputs, directions)]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "bfloat16, float32 weight", "no delta"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (200, 130), (2, 3, 768), (3, 2050)])
def test_gradients(target, kind, dropout, shape):
    generator = torch.Generator().manual_seed(shape[-1])
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind.split(",")[0], torch.float32)
    x = torch.randn(*shape, generator=generator).to(target)
    delta = None if kind == "no delta" else torch.randn(*shape, generator=generator).to(target, dtype)
    weight = (1 + 0.1 * torch.randn(shape[-1], generator=generator)).to(target)
    weight = weight if "float32" in kind else weight.to(dtype)
    arguments = (x, delta, weight, 0.0 if delta is None else dropout, 7)
    got = sum_normed_and_gradients(*arguments)
    with use_reference():
        low = sum_normed_and_gradients(*arguments)
        exact = sum_normed_and_gradients(*(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
    for own, rounded, expected in zip(got, low, exact, strict=True):
        assert own.dtype == rounded.dtype
        size = expected.abs().max()
        bound = 3 * (rounded.double() - expected).abs().max() + TOLERANCE[own.dtype] * size
        # The direction of `normed` is rounded in low precision and not in the exact one.
        bound += 2 * TOLERANCE[dtype] * size if dtype != torch.float32 else 0
        assert (own.double() - expected).abs().max() <= bound


def test_dropout_is_the_documented_mask(target):
    delta, weight = torch.ones(9, 300, device=target), torch.ones(300, device=target)
    total, _ = add_rms_norm(torch.zeros_like(delta), delta, weight, dropout=0.25, seed=-3)
    mask, kept = keep_mask(torch.tensor([-3], device=target), 1, 9, 300, 0.25)
    assert torch.equal(total, mask[0] / kept)
    torch.manual_seed(0)
    first, second = (add_rms_norm(delta, delta, weight, dropout=0.25)[0] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(add_rms_norm(delta, delta, weight, dropout=0.25)[0], first) and not torch.equal(first, second)


def test_same_gradients_for_every_number_of_threads():
    x, delta, weight = torch.randn(700, 96), torch.randn(700, 96), torch.randn(96)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(sum_normed_and_gradients(x, delta, weight, 0.1, 3))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_add_rms_norm_compiles_and_is_differentiated_once(device):
    x, delta, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((4, 9), (4, 9), (9,)))

    def run(x, delta, weight):
        total, normed = add_rms_norm(x, delta, weight, dropout=0.5, seed=1)
        return total.sum() + (normed**3).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(x, delta, weight), [x, delta, weight]) for f in (run, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    (grad,) = torch.autograd.grad(run(x, delta, weight), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


def test_opcheck(device):
    x, weight = torch.randn(3, 40, device=device), torch.randn(40, device=device)
    seed = torch.tensor([1], device=device)
    forward, backward = torch.ops.alitok.add_rms_norm.default, torch.ops.alitok.add_rms_norm_backward.default
    leaves = [t.clone().requires_grad_() for t in (x, torch.randn_like(x), weight)]
    torch.library.opcheck(forward, (*leaves, 1e-5, 0.1, seed))
    torch.library.opcheck(forward, (x, x.bfloat16(), weight, 1e-5, 0.0, None))
    torch.library.opcheck(forward, (x, None, weight.bfloat16(), 1e-5, 0.0, None))
    torch.library.opcheck(backward, (x.clone(), x.bfloat16(), x, weight, 1e-5, 0.1, seed))
    torch.library.opcheck(backward, (None, x.clone(), x, weight, 1e-5, 0.0, None))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: add_rms_norm(x.half(), None, w), "x: expected float32, got float16"),
        (lambda x, w: add_rms_norm(x, x[:, :4], w), r"delta: expected the shape of x, \(3, 8\), got shape \(3, 4\)"),
        (lambda x, w: add_rms_norm(x, x, w.half()), "delta: expected float16, got float32"),
        (lambda x, w: add_rms_norm(x, x.double(), w), "delta: expected float32 or bfloat16 or float16, got float64"),
        (lambda x, w: add_rms_norm(x, x, w, dropout=1.0), r"dropout: expected a probability in \[0, 1\), got 1"),
        (lambda x, w: add_rms_norm(x, None, w, dropout=0.5), "dropout: expected 0 where delta is None, got 0.5"),
        (lambda x, w: add_rms_norm(x, x, w, dropout=0.5, seed=w), "seed: expected int64, got float32"),
        (lambda x, w: add_rms_norm(x, x[:1], w), r"delta: expected the shape of x, \(3, 8\), got shape \(1, 8\)"),
        # As many rows in another order would be added without a word.
        (
            lambda x, w: add_rms_norm(x.expand(2, 3, 8), x.expand(2, 3, 8).transpose(0, 1), w),
            "delta: expected the shape",
        ),
        (lambda x, w: add_rms_norm(x.sum(), None, w), r"x: expected at least 1 dimension, got shape \(\)"),
        (lambda x, w: add_rms_norm(x, None, w[:5]), "weight: expected size 8 along dimension 0"),
    ],
)
def test_messages(call, message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        call(torch.ones(3, 8), torch.ones(8))
