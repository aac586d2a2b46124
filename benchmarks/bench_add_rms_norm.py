"""add_rms_norm at the shapes of a sampling step, and of training with dropout and backward, beside torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alitok_fast.config import GENERATORS
from alitok_fast.ops import add_rms_norm
from alitok_fast.ops.add_rms_norm import add_rms_norm_reference

CONFIG = GENERATORS["b"]
EPS, DROPOUT, SEED = 1e-5, 0.1, 3


@pytest.fixture
def inputs(device):
    def make(rows):
        generator = torch.Generator().manual_seed(0)
        x, delta = (torch.randn(rows, CONFIG.width, generator=generator).to(device) for _ in range(2))
        return x, delta.bfloat16(), 1 + 0.1 * torch.randn(CONFIG.width, generator=generator).to(device)

    return make


def chain(x, delta, weight, dropout=0.0):
    """What a model in torch does, with the residual stream in float32."""
    total = x + F.dropout(delta.float(), dropout)
    return total, (F.rms_norm(total, total.shape[-1:], weight, EPS)).to(delta.dtype)


@pytest.mark.quick("2")
@pytest.mark.parametrize("rows", [2, 16])
def bench_add_rms_norm(rows, inputs, compare):
    x, delta, weight = inputs(rows)
    for found, expected in zip(add_rms_norm(x, delta, weight), chain(x, delta, weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    functions = {"torch": lambda: chain(x, delta, weight)}
    compare(lambda: add_rms_norm(x, delta, weight), functions, x.nbytes + delta.nbytes, "read_bytes")


@pytest.mark.quick
def bench_add_rms_norm_backward(mode, inputs, compare):
    """A batch of training: 8 images of B."""
    leaves = [t.requires_grad_() for t in inputs(mode.pick(check=20, quick=512, full=8 * CONFIG.num_tokens))]
    directions = [torch.randn_like(t) for t in add_rms_norm(*leaves)]
    seed = torch.tensor([SEED], device=leaves[0].device)

    def gradients(operator, *rest):
        return torch.autograd.grad(operator(*leaves, *rest), leaves, directions)

    def reference():
        return gradients(add_rms_norm_reference, EPS, DROPOUT, seed)

    def own():
        return gradients(add_rms_norm, EPS, DROPOUT, seed)

    for found, expected in zip(own(), reference(), strict=True):
        torch.testing.assert_close(
            found.float(), expected.float(), rtol=2**-6, atol=2**-6 * expected.abs().max().item()
        )
    functions = {"torch": lambda: gradients(chain, DROPOUT), "reference": reference}
    x, delta, _ = leaves
    # Forward reads x and delta; backward the sum and the gradients of both results.
    compare(own, functions, x.nbytes + delta.nbytes + 2 * x.nbytes + delta.nbytes, "read_bytes")
