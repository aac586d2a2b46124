"""Residual addition, dropout on what is added, and the RMSNorm behind it, in one pass.

In a sampling step it is one small kernel instead of several; in training one pass instead of the dozen over the
residual stream that torch makes of it, forward and backward (docs/tuning.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_autograd, register_fake
from alitok_fast.ops.dropout import keep_mask, seed_tensor


def add_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """x + dropout(delta), and its RMSNorm.

    The residual stream stays float32 whatever the precision of the layers.

    Args:
        x: (..., width) float32.
        delta: (..., width), what the layer before adds, in the dtype of `weight`, or in any of float32, bfloat16 and
            float16 where `weight` is float32; None adds nothing.
        weight: (width,) float32, bfloat16 or float16.
        eps: added to the mean square.
        dropout: probability in [0, 1), rounded to a multiple of 2**-16, of dropping an element of `delta`.
        seed: int, or int64 tensor of one element on the device of `x`: key of the mask, `keep_mask` with head 0 and the
            row's number. None draws one from torch's default generator.

    Returns:
        sum: (..., width) float32, `x` itself where delta is None.
        normed: (..., width) in the dtype of `delta`, of `weight` where delta is None: sum / rms(sum), rounded to the
            dtype of `weight`, times the weight.
        Differentiable once; the gradients are the same in every run and for every number of threads.

    Raises:
        ValueError, RuntimeError: naming the argument, what was expected and what was given.
    """
    seed = seed_tensor(seed, x.device) if dropout > 0 else None
    operator = torch.ops.alitok.add_rms_norm if native_enabled() else add_rms_norm_reference
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    added = delta if delta is None or delta.ndim == 2 else delta.reshape(-1, delta.shape[-1])
    total, normed = operator(rows, added, weight, eps, dropout, seed)
    return (x if delta is None else total.view(x.shape)), normed.view(x.shape)


def add_rms_norm_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition of `add_rms_norm` for (rows, width); as the native operator it gives an empty sum where delta is
    None."""
    total, dtype = x, weight.dtype
    with torch.autocast(x.device.type, enabled=False):
        if delta is not None:
            dtype, added = delta.dtype, delta.to(x.dtype)
            if dropout > 0:
                mask, kept = keep_mask(seed, 1, *x.shape, dropout)
                added = added * mask[0] / kept
            total = x + added
        normed = F.rms_norm(total, total.shape[-1:], eps=eps).to(weight.dtype) * weight
    return (x.new_empty(0) if delta is None else total), normed.to(dtype)


@register_fake("add_rms_norm")
def _(x, delta, weight, eps, dropout, seed):
    total = x.new_empty(0) if delta is None else torch.empty_like(x)
    return total, x.new_empty(x.shape, dtype=weight.dtype if delta is None else delta.dtype)


@register_fake("add_rms_norm_backward")
def _(grad_sum, grad_normed, x, weight, eps, dropout, seed):
    grad_delta = grad_normed.new_empty(0) if grad_sum is None else torch.empty_like(grad_normed)
    return torch.empty_like(x), grad_delta, x.new_empty(x.shape[1])


def _save_for_backward(ctx, inputs, output) -> None:
    x, delta, weight, ctx.eps, ctx.dropout, seed = inputs
    ctx.added = delta is not None
    ctx.save_for_backward(output[0] if ctx.added else x, weight, seed)


def _backward(ctx, grad_sum, grad_normed):
    total, weight, seed = ctx.saved_tensors
    grad_x, grad_delta, grad_weight = torch.ops.alitok.add_rms_norm_backward(
        grad_sum.contiguous() if ctx.added else None,
        grad_normed.contiguous(),
        total,
        weight,
        ctx.eps,
        ctx.dropout,
        seed,
    )
    return grad_x, grad_delta if ctx.added else None, grad_weight.to(weight.dtype), None, None, None


def _backward_of_backward(ctx, *_):
    raise RuntimeError("add_rms_norm: expected to be differentiated once, got a second time; use_reference() allows it")


register_autograd("add_rms_norm", _backward, _save_for_backward)
register_autograd("add_rms_norm_backward", _backward_of_backward, lambda ctx, inputs, output: None)
