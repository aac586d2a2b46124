"""The end of a generator's step: the last norm and the head, in float32.

Its logits are what guidance amplifies, so that neither is rounded to fewer bits. On a GPU with few rows the time is
that of reading the head's weights, which one kernel asks for before the last block of the generator has ended.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_autograd, register_fake
from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.arguments import check_one_device
from alitok_fast.ops.derivatives import refuse_gradients

MOST_ROWS, MOST_WIDTH, WIDTH_MULTIPLE = 32, 1280, 4
"""Rows and widths that the kernel takes."""

NO_GRADIENTS = "it is for sampling; use_reference() allows it"


def norm_head(
    x: Tensor, delta: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """RMSNorm of a residual stream, and a linear layer of it, in float32.

    Source: the generator's last norm and head (AliTok, arXiv 2506.05289, section 3).

    Devices: CPU and CUDA; one kernel on CUDA for up to 32 rows without `delta`, of float32 up to 1,280 wide, outside
    autocast; else `add_rms_norm` and torch's product. The kernel reads weights and bias before the kernel ahead has
    ended: they may not be results of this package's operators. A row's logits do not depend on the rows beside it
    there.

    Gradients: none; where the kernel is used, differentiating is refused.

    Args:
        x: (R, width) float32, the residual stream; `delta` (R, width) or None is what must still be added to it.
        norm_weight: (width,).
        eps: added to the mean square.
        weight: (outputs, width).
        bias: (outputs,), or None.

    Returns:
        (R, outputs): rms_norm(x + delta) weight^T + bias.
    """
    if delta is None and _fits(x, norm_weight, weight, bias):
        refuse_gradients("norm_head", NO_GRADIENTS, x=x, norm_weight=norm_weight, weight=weight, bias=bias)
        return torch.ops.alitok.norm_head(x, norm_weight, eps, weight, bias)
    _, normed = add_rms_norm(x, None if delta is None else delta.to(norm_weight.dtype), norm_weight, eps)
    return F.linear(normed, weight, bias)


def _fits(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = [x, norm_weight, weight, *(() if bias is None else (bias,))]
    return (
        weight.is_cuda
        and native_enabled()
        and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in given)
        and 0 < x.shape[0] <= MOST_ROWS
        and x.shape[1] <= MOST_WIDTH
        and x.shape[1] % WIDTH_MULTIPLE == 0
        and not torch.is_autocast_enabled(weight.device.type)
    )


def norm_head_reference(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, in the precision of the arguments."""
    return F.linear(F.rms_norm(x, x.shape[-1:], eps=eps) * norm_weight, weight, bias)


@register_fake("norm_head")
def _(x, norm_weight, norm_eps, weight, bias):
    check_one_device(x=x, norm_weight=norm_weight, weight=weight, bias=bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _refuse(ctx, *_):
    raise RuntimeError(f"norm_head: expected inputs without gradients; {NO_GRADIENTS}")


register_autograd("norm_head", _refuse, lambda ctx, inputs, output: None)
