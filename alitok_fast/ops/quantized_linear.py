"""A linear layer with 8-bit weights, for the few rows of a sampling step: it reads half the bytes of bfloat16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import load_error, native_enabled, register_autograd, register_fake
from alitok_fast.ops.arguments import (
    as_rows,
    check_matrix,
    check_one_device,
    check_optional_tensors,
    check_tensors,
    without_autocast,
)
from alitok_fast.ops.derivatives import refuse_transforms

NO_GRADIENTS = "8-bit weights are for sampling; use_reference() allows it"
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The value to which each dtype scales the largest weight of a group."""

MOST_ROWS = 32
"""Up to this many rows, the weights are used as they are. For more they are written out in the dtype of `x`
(`widen_weight`), and torch's matrix product takes them. On an H100 the kernel takes 4.5 us for the qkv layer of B at 2
rows, as does torch's product in bfloat16, and 14 to 21 us at 16 to 32 rows: sampling uses `fused_linear` instead."""

GROUP_INPUTS = 64
"""How many neighbouring weights of an output share a scale, as in the CPU's int8 (docs/precision.md)."""


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to int8 or float8_e4m3fn, with a scale for each output and 64 inputs.

    Scales are bfloat16: 3% more bytes than the weights alone, where float32 would be 6%. A scale is rounded up before
    the weights are divided by it, which makes the steps between weights at most 1/128 larger.

    Args:
        weight: (outputs, inputs) floating point, finite. Gradients are not recorded.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
        The weights, (outputs, inputs) in `dtype`, and the scales, (outputs, ceil(inputs / 64)) bfloat16, on the device
        of `weight`.

    Raises:
        TypeError: for what is not a floating-point tensor.
        ValueError: for another dtype or number of dimensions.
    """
    check_matrix("weight", weight)
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
    """x >= 0 as bfloat16, never smaller than it was: weights divided by such a scale never exceed the largest value."""
    rounded = x.bfloat16()
    return torch.where(rounded.float() < x, (rounded.view(torch.int16) + 1).view(torch.bfloat16), rounded)


def dequantize_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that an 8-bit weight and its scales stand for.

    Args:
        weight: (outputs, inputs) int8 or float8_e4m3fn.
        scale: (outputs, ceil(inputs / 64)) bfloat16.
        dtype: of the result; float32 and float64 hold the products exactly.

    Returns:
        (outputs, inputs) in `dtype`.
    """
    wide = scale.to(dtype).repeat_interleave(GROUP_INPUTS, 1)[:, : weight.shape[1]]
    return weight.to(dtype) * wide


def widen_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize_weight`, rounded once to `dtype`, float32, bfloat16 or float16. On CUDA it is one kernel."""
    if weight.is_cuda and native_enabled():
        return torch.ops.alitok.quantized_linear_widen(weight, scale, dtype)
    # bfloat16 holds all 8-bit values and scales, so that their product is rounded once; float16 not all scales.
    exact = dtype if dtype == torch.bfloat16 else torch.float32
    return dequantize_weight(weight, scale, exact).to(dtype)


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, where W is `weight` times the scale of its output and group of 64 inputs.

    Source: no paper; the rounding is described and measured in docs/precision.md.

    Devices: CPU and CUDA. The dtype of the result is that of `x`, also under autocast.

    Gradients: none; differentiating the result is refused, as are forward-mode derivatives. `torch.vmap` runs the
    operator once per element.

    Args:
        x: (..., inputs) float32, bfloat16 or float16.
        weight: (outputs, inputs) int8 or float8_e4m3fn, contiguous, of `quantize_weight`.
        scale: (outputs, ceil(inputs / 64)) bfloat16, contiguous, of `quantize_weight`.
        bias: (outputs,) in the dtype of `x`, or None.

    Returns:
        (..., outputs) in the dtype of `x`. Sums are float32. Beyond MOST_ROWS rows, W is first rounded to the dtype of
        `x`.

    Raises:
        TypeError: for an argument that is not a tensor.
        ValueError: for shapes, dtypes, strides or devices that do not fit. The message names the argument, what was
            expected and what was given.
        RuntimeError: where a derivative is asked for.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    check_tensors(x=x, weight=weight, scale=scale)
    check_optional_tensors(bias=bias)
    rows, operator = as_rows("x", x), quantized_linear_reference
    if native_enabled():
        refuse_transforms("quantized_linear", NO_GRADIENTS, x=x, scale=scale, bias=bias)
        # A traced program serves any number of rows: there the choice is made when it runs.
        few = not torch.compiler.is_compiling() and rows.shape[0] <= MOST_ROWS
        operator = torch.ops.alitok.quantized_linear if few else torch.ops.alitok.quantized_linear_any_rows
    return operator(rows, weight, scale, bias).view(*x.shape[:-1], weight.shape[0])


@without_autocast
def quantized_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The definition of `quantized_linear` for (rows, inputs), with W never rounded."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(compute) @ dequantize_weight(weight, scale, compute).T
    return (out if bias is None else out + bias).to(x.dtype)


@without_autocast
def _any_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`quantized_linear` for (rows, inputs): few rows by the kernel, many by torch's matrix product."""
    if x.shape[0] <= MOST_ROWS:
        return torch.ops.alitok.quantized_linear(x, weight, scale, bias)
    torch.ops.alitok.quantized_linear(x[:0], weight, scale, bias)  # checks the arguments
    return F.linear(x, widen_weight(weight, scale, x.dtype), bias)


def _fake(x, weight, scale, bias):
    check_one_device(x=x, weight=weight, scale=scale, bias=bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _refuse(ctx, *_):
    raise RuntimeError(
        f"quantized_linear: expected inputs without gradients, got some to differentiate; {NO_GRADIENTS}"
    )


@register_fake("quantized_linear_widen")
def _(weight, scale, dtype):
    check_one_device(weight=weight, scale=scale)
    return weight.new_empty(weight.shape, dtype=dtype)


if load_error is None:
    _library = torch.library.Library("alitok", "FRAGMENT")
    _library.define("quantized_linear_any_rows(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
    _library.impl("quantized_linear_any_rows", _any_rows, "CompositeExplicitAutograd")

for _name in ("quantized_linear", "quantized_linear_any_rows"):
    register_fake(_name)(_fake)
    register_autograd(_name, _refuse, lambda ctx, inputs, output: None)
