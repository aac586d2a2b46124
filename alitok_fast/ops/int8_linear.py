"""A linear layer with weights and activations in 8 bits, for the many rows of a decoder pass on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_autograd, register_fake
from alitok_fast.ops.decode_weights import PANEL_OUTPUTS, grouped_by_four_bytes, one_output_a_row
from alitok_fast.ops.quantized_linear import GROUP_INPUTS

LARGEST = 127
OFFSET = 128  # stored weights are so much too large


def pack_int8(weight: Tensor) -> Tensor:
    """Round weights (outputs, inputs), a scale for each output and 64 inputs, and lay them out for `int8_linear`.

    Returns:
        (ceil(outputs / 32), ceil(inputs / 64), 2176) uint8; csrc/int8_linear.h states the layout.

    Raises:
        ValueError: where a weight is not finite.
    """
    weight = weight.detach().float().cpu()
    if not weight.isfinite().all():
        raise ValueError("weight: expected finite numbers, got some that are not")
    outputs, inputs = weight.shape
    panels = F.pad(weight, (0, -inputs % GROUP_INPUTS, 0, -outputs % PANEL_OUTPUTS)).unflatten(0, (-1, PANEL_OUTPUTS))
    whole, scale = round_groups(panels)  # (panels, outputs, groups, inputs), (panels, outputs, groups)
    bytes_ = grouped_by_four_bytes((whole + OFFSET).to(torch.uint8).transpose(1, 2))
    return torch.cat([bytes_, scale.transpose(1, 2).contiguous().view(torch.uint8)], -1)


def unpack_int8(packed: Tensor, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """What `pack_int8` made: integers (outputs, groups, 64) and scales (outputs, groups), both float32."""
    bytes_, scale = packed.split([PANEL_OUTPUTS * GROUP_INPUTS, 4 * PANEL_OUTPUTS], -1)
    whole = one_output_a_row(bytes_, torch.uint8).transpose(1, 2).float() - OFFSET
    scale = scale.contiguous().view(torch.float32).transpose(1, 2)
    return whole.flatten(0, 1)[:outputs], scale.flatten(0, 1)[:outputs]


def round_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers in -127..127 (..., groups, 64) and a scale (..., groups) for x (..., 64 groups), all float32.

    A group that is not finite becomes zeros with a scale of NaN.
    """
    groups = x.float().unflatten(-1, (-1, GROUP_INPUTS))
    largest = groups.abs().amax(-1)
    inverse = torch.full_like(largest, LARGEST) / largest  # a number over a tensor would be rounded twice
    usable = largest.isfinite() & inverse.isfinite()
    whole = torch.where(usable[..., None], (groups * inverse[..., None]).round(), 0.0)
    empty = torch.where(largest.isfinite(), 0.0, torch.nan)
    return whole, torch.where(usable, largest / LARGEST, empty)


def int8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x W^T + bias; every 64 neighbouring inputs of a row of x share a scale, as those of the weights do (W8A8).

    Args:
        x: (..., inputs) float32 or bfloat16, on the CPU.
        weight: of `pack_int8`.
        bias: (outputs,) float32, or None.
        outputs: of W.
        dtype: of the result, float32 or bfloat16.

    Returns:
        (..., outputs). Sums are float32. Where a group of x is not finite, its row is NaN.

    Raises:
        RuntimeError, ValueError: naming the argument, what was expected and what was given; gradients are refused.
    """
    operator = torch.ops.alitok.int8_linear if native_enabled() else int8_linear_reference
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return operator(rows, weight, bias, outputs, dtype).view(*x.shape[:-1], outputs)


def int8_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, dtype: torch.dtype) -> Tensor:
    """The definition of `int8_linear` for (rows, inputs). With `dtype` float64 sums are exact to that."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rounded = _scaled(*round_groups(F.pad(x, (0, -x.shape[1] % GROUP_INPUTS))), compute)
    out = rounded @ _scaled(*unpack_int8(weight, outputs, x.shape[1]), compute).T
    return (out if bias is None else out + bias).to(dtype)


def _scaled(whole: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (whole.to(dtype) * scale.to(dtype)[..., None]).flatten(1)


@register_fake("int8_linear")
def _(x, weight, bias, outputs, dtype):
    return x.new_empty(x.shape[0], outputs, dtype=dtype)


def _backward(ctx, *_):
    raise RuntimeError("int8_linear: expected inputs without gradients, got some to differentiate; 8-bit products are "
                       "for decoding")  # fmt: skip


register_autograd("int8_linear", _backward, lambda ctx, inputs, output: None)
