"""A linear layer with 8-bit weights, for the few rows of a sampling step: half the bytes of bfloat16 to read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_autograd, register_fake

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The value that each dtype gives an output's largest weight."""

MOST_ROWS = 32
"""Up to so many rows the weights are used as they are. For more they are written out in the dtype of `x` and go through
torch's matrix product: by then it, not reading them, takes the time. Not measured on a GPU."""


GROUP_INPUTS = 64
"""Weights of an output that share a scale: as for the CPU's int8 (docs/precision.md)."""


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(outputs, inputs) rounded to int8 or float8_e4m3fn, and the scale of each output and 64 inputs.

    Scales are (outputs, ceil(inputs / 64)) bfloat16: 3% more bytes than the weights alone, where float32 would be 6%,
    and rounding the scale first only makes the steps between weights up to 1/128 larger.
    """
    if dtype not in LARGEST:
        raise ValueError(f"dtype: expected int8 or float8_e4m3fn, got {str(dtype).removeprefix('torch.')}")
    outputs, inputs = weight.shape
    groups = -(-inputs // GROUP_INPUTS)
    padded = F.pad(weight.detach().float(), (0, groups * GROUP_INPUTS - inputs))
    grouped = padded.view(outputs, groups, GROUP_INPUTS)
    scale = rounded_up_to_bfloat16(grouped.abs().amax(-1) / LARGEST[dtype])
    scaled = (grouped / torch.where(scale > 0, scale, 1.0).float().unsqueeze(-1)).flatten(1)[:, :inputs]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype).contiguous(), scale


def rounded_up_to_bfloat16(x: Tensor) -> Tensor:
    """Of what is >= 0: weights divided by such a scale are never beyond what the largest one asked for."""
    rounded = x.bfloat16()
    return torch.where(rounded.float() < x, (rounded.view(torch.int16) + 1).view(torch.bfloat16), rounded)


def dequantize_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (outputs, inputs) that an 8-bit weight and its scales stand for: exact in float32 and float64."""
    wide = scale.to(dtype).repeat_interleave(GROUP_INPUTS, 1)[:, : weight.shape[1]]
    return weight.to(dtype) * wide


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with W = weight times the scale of its output and group of 64 inputs.

    Args:
        x: (..., inputs) float32, bfloat16 or float16.
        weight: (outputs, inputs) int8 or float8_e4m3fn, contiguous.
        scale: (outputs, ceil(inputs / 64)) bfloat16.
        bias: (outputs,) in the dtype of `x`, or None.

    Returns:
        (..., outputs) in the dtype of `x`. Sums are float32; beyond MOST_ROWS rows W is rounded to the dtype of `x`
        first.

    Raises:
        RuntimeError, ValueError: naming the argument, what was expected and what was given; gradients are refused.
    """
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if len(rows) > MOST_ROWS:
        # bfloat16 holds all 8-bit values and scales, so that their product is rounded once; float16 not all scales.
        exact = x.dtype if x.dtype == torch.bfloat16 else torch.float32
        return F.linear(x, dequantize_weight(weight, scale, exact).to(x.dtype), bias)
    operator = torch.ops.alitok.quantized_linear if native_enabled() else quantized_linear_reference
    return operator(rows, weight, scale, bias).view(*x.shape[:-1], len(weight))


def quantized_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The definition of `quantized_linear` for (rows, inputs)."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(compute) @ dequantize_weight(weight, scale, compute).T
    return (out if bias is None else out + bias).to(x.dtype)


@register_fake("quantized_linear")
def _(x, weight, scale, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _backward(ctx, *_):
    raise RuntimeError("quantized_linear: expected inputs without gradients, got some to differentiate; 8-bit weights "
                       "are for sampling")  # fmt: skip


register_autograd("quantized_linear", _backward, lambda ctx, inputs, output: None)
