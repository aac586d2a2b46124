"""A residual addition, dropout on what is added, and the RMSNorm that follows, in one pass.

In a sampling step it is one small kernel instead of several. In training it is one pass over the residual stream, where
torch makes a dozen of it, forward and backward (docs/tuning.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_autograd, register_fake
from alitok_fast.ops.arguments import (
    as_rows,
    check_one_device,
    check_optional_tensors,
    check_tensors,
    number,
    real,
    without_autocast,
)
from alitok_fast.ops.derivatives import differentiated_once, refuse_transforms
from alitok_fast.ops.dropout import keep_mask, seed_tensor


def add_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x + dropout(delta), and its RMSNorm.

    The residual stream stays float32 whatever the precision of the layers.

    Source: the generator's pre-norm blocks (AliTok, arXiv 2506.05289, section 3); RMSNorm is arXiv 1910.07467.

    Devices: CPU and CUDA. Autocast changes no dtype.

    Gradients: with respect to `x`, `delta` and `weight`, once; they are the same in every run and for every number of
    threads. Second derivatives, forward-mode derivatives and those of `torch.func` are refused. `torch.vmap` runs the
    operator once per element; with an explicit `seed` each element gets the same dropout mask.

    Args:
        x: (..., width) float32; the residual stream.
        delta: (..., width), what the layer before adds, in the dtype of `weight`, or in any of float32, bfloat16 and
            float16 where `weight` is float32. None adds nothing.
        weight: (width,) float32, bfloat16 or float16.
        eps: a number >= 0, added to the mean square.
        dropout: probability in [0, 1), rounded to a multiple of 2**-16, of dropping an element of `delta`; 0 where
            `delta` is None.
        seed: the key of the dropout mask: an int in the range of int64, or an int64 tensor of one element on the device
            of `x`. The mask is `keep_mask` with head 0 and the row's number. None takes a key from torch's default
            generator.

    Returns:
        sum: (..., width) float32; `x` itself where `delta` is None.
        normed: (..., width) in the dtype of `delta`, or of `weight` where `delta` is None: sum / rms(sum), rounded to
            the dtype of `weight`, times the weight.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for shapes, dtypes, devices or values that do not fit. The message names the argument, what was
            expected and what was given.
        RuntimeError: for a derivative that the operator does not have.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    check_tensors(x=x, weight=weight)
    check_optional_tensors(delta=delta)
    eps, dropout = number("eps", eps, lowest=0), real("dropout", dropout)
    rows, added = as_rows("x", x), None
    if delta is not None:
        if delta.shape != x.shape:
            raise ValueError(f"delta: expected the shape of x, {tuple(x.shape)}, got shape {tuple(delta.shape)}")
        added = as_rows("delta", delta)
    seed = seed_tensor(seed, x.device) if dropout > 0 else None
    operator = add_rms_norm_reference
    if native_enabled():
        refuse_transforms("add_rms_norm", x=x, delta=delta, weight=weight)
        operator = torch.ops.alitok.add_rms_norm
    total, normed = operator(rows, added, weight, eps, dropout, seed)
    return (x if delta is None else total.view(x.shape)), normed.view(x.shape)


@without_autocast
def add_rms_norm_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition of `add_rms_norm` for (rows, width); as the native operator it gives an empty sum where delta is
    None."""
    total, dtype = x, weight.dtype
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
    check_one_device(x=x, delta=delta, weight=weight, seed=seed)
    total = x.new_empty(0) if delta is None else torch.empty_like(x)
    return total, x.new_empty(x.shape, dtype=weight.dtype if delta is None else delta.dtype)


@register_fake("add_rms_norm_backward")
def _(grad_sum, grad_normed, x, weight, eps, dropout, seed):
    check_one_device(x=x, grad_sum=grad_sum, grad_normed=grad_normed, weight=weight, seed=seed)
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


register_autograd("add_rms_norm", _backward, _save_for_backward)
differentiated_once("add_rms_norm")
