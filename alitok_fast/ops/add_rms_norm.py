"""Residual addition and the RMSNorm behind it in one pass: two of the small kernels of a sampling step.

Forward only: training leaves these element-wise chains to torch.compile, which fuses them as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_fake


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """x + delta, and its RMSNorm.

    The residual stream stays float32 whatever the precision of the layers.

    Args:
        x: (R, width) float32, contiguous.
        delta: (R, width) in the dtype of `weight`, what the layer before adds; None adds nothing.
        weight: (width,) float32, bfloat16 or float16.
        eps: added to the mean square.

    Returns:
        sum: (R, width) float32, `x` itself where delta is None.
        normed: (R, width) in the dtype of `weight`: sum / rms(sum) rounded to that dtype, times the weight.

    Raises:
        ValueError, RuntimeError: naming the argument, what was expected and what was given.
    """
    operator = torch.ops.alitok.add_rms_norm if native_enabled() else add_rms_norm_reference
    total, normed = operator(x, delta, weight, eps)
    return (x if delta is None else total), normed


def add_rms_norm_reference(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition of `add_rms_norm`; as the native operator it gives an empty sum where delta is None."""
    total = x if delta is None else x + delta
    normed = F.rms_norm(total, total.shape[-1:], eps=eps).to(weight.dtype) * weight
    return (x.new_empty(0) if delta is None else total), normed


@register_fake("add_rms_norm")
def _(x, delta, weight, eps):
    return (x.new_empty(0) if delta is None else torch.empty_like(x)), x.new_empty(x.shape, dtype=weight.dtype)
