"""A linear layer with weights and activations in 8 bits, for the many rows of a tokenizer's pass on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import register_autograd, register_fake
from alitok_fast.ops.arguments import check_matrix, check_one_device, without_autocast
from alitok_fast.ops.decode_weights import PANEL_OUTPUTS, grouped_by_four_bytes, one_output_a_row
from alitok_fast.ops.packed_linear import RowNorm, packed_linear, refuse_backward, with_ends
from alitok_fast.ops.quantized_linear import GROUP_INPUTS

LARGEST = 127
OFFSET = 128  # stored weights are unsigned, and exceed the signed ones by this number


def pack_int8(weight: Tensor) -> Tensor:
    """Round a weight matrix to int8, with a scale for each output and 64 inputs, and lay it out for `int8_linear`.

    Args:
        weight: (outputs, inputs) floating point, on any device. Gradients are not recorded.

    Returns:
        (ceil(outputs / 32), ceil(inputs / 64), 2176) uint8 on the CPU; csrc/int8_linear.h states the layout.

    Raises:
        TypeError: for what is not a floating-point tensor.
        ValueError: for another number of dimensions, and where a weight is not finite.
    """
    check_matrix("weight", weight)
    weight = weight.detach().float().cpu()
    if not weight.isfinite().all():
        raise ValueError("weight: expected finite numbers, got some that are not")
    outputs, inputs = weight.shape
    panels = F.pad(weight, (0, -inputs % GROUP_INPUTS, 0, -outputs % PANEL_OUTPUTS)).unflatten(0, (-1, PANEL_OUTPUTS))
    whole, scale = round_groups(panels)  # (panels, outputs, groups, inputs), (panels, outputs, groups)
    bytes_ = grouped_by_four_bytes((whole + OFFSET).to(torch.uint8).transpose(1, 2))
    return torch.cat([bytes_, scale.transpose(1, 2).contiguous().view(torch.uint8)], -1)


def unpack_int8(packed: Tensor, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_int8`: whole numbers (outputs, groups, 64) and scales (outputs, groups), both float32."""
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
    inverse = torch.full_like(largest, LARGEST) / largest  # a Python number over a tensor would be rounded twice
    usable = largest.isfinite() & inverse.isfinite()
    whole = torch.where(usable[..., None], (groups * inverse[..., None]).round(), 0.0)
    # Not torch.where of two numbers: its result has the default dtype, which is the user's to choose.
    empty = torch.zeros_like(largest).masked_fill(~largest.isfinite(), torch.nan)
    return whole, torch.where(usable, largest / LARGEST, empty)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    dtype: torch.dtype = torch.float32,
    *,
    norm: RowNorm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Return x W^T + bias, with x and W in 8 bits: 64 neighbouring inputs of a row share a scale (W8A8).

    What stands before and after such a product in a transformer can be part of the call:
    residual + gelu(norm(x) W^T + bias), all but the product in float32.

    Source: no paper; the rounding is described and measured in docs/precision.md.

    Devices: CPU. The dtype of the result is `dtype`, also under autocast.

    Gradients: none; differentiating the result is refused, as are forward-mode derivatives. `torch.vmap` runs the
    operator once per element.

    Args:
        x: (..., inputs) float32 or bfloat16, on the CPU.
        weight: the result of `pack_int8` for W, (ceil(outputs / 32), ceil(inputs / 64), 2176) uint8.
        bias: (outputs,) float32, or None.
        outputs: the number of rows of W, >= 0.
        dtype: the dtype of the result, float32 or bfloat16; float32 with a residual.
        norm: a LayerNorm over each row of x, before it is rounded, or None.
        gelu: whether to apply the exact GELU, x Phi(x).
        residual: (..., outputs) float32, which is added, or None.

    Returns:
        (..., outputs) in `dtype`. Sums are float32. A row of x with NaN or an infinity gives a row of NaN.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for shapes, dtypes or devices that do not fit. The message names the argument, what was expected and
            what was given.
        RuntimeError: where a derivative is asked for.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    return packed_linear("int8_linear", int8_linear_reference, x, weight, bias, outputs, dtype, norm, gelu, residual)


@without_autocast
def int8_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    dtype: torch.dtype,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition of `int8_linear` for (rows, inputs). With `dtype` float64, sums are float64 too."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def product(rows: Tensor) -> Tensor:
        rounded = _scaled(*round_groups(F.pad(rows.float(), (0, -rows.shape[1] % GROUP_INPUTS))), compute)
        return rounded @ _scaled(*unpack_int8(weight, outputs, rows.shape[1]), compute).T

    return with_ends(x, product, bias, dtype, norm_weight, norm_bias, norm_eps, gelu, residual)


def _scaled(whole: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (whole.to(dtype) * scale.to(dtype)[..., None]).flatten(1)


@register_fake("int8_linear")
def _(x, weight, bias, outputs, dtype, norm_weight=None, norm_bias=None, norm_eps=1e-5, gelu=False, residual=None):
    check_one_device(x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    return x.new_empty(x.shape[0], outputs, dtype=dtype)


register_autograd("int8_linear", refuse_backward("int8_linear"), lambda ctx, inputs, output: None)
