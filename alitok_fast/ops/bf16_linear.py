"""A linear layer with weights and activations in bfloat16, for the many rows of a tokenizer's pass on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import register_autograd, register_fake
from alitok_fast.ops.arguments import check_matrix, check_one_device, without_autocast
from alitok_fast.ops.packed_linear import RowNorm, packed_linear, refuse_backward, with_ends

PANEL_OUTPUTS = STEP_INPUTS = 32


def pack_bf16(weight: Tensor) -> Tensor:
    """Round a weight matrix to bfloat16 and lay it out for `bf16_linear`.

    Args:
        weight: (outputs, inputs) floating point, on any device. Gradients are not recorded.

    Returns:
        (ceil(outputs / 32), ceil(inputs / 32), 1024) bfloat16 on the CPU; csrc/bf16_linear.h states the layout.

    Raises:
        TypeError: for what is not a floating-point tensor.
        ValueError: for another number of dimensions.
    """
    check_matrix("weight", weight)
    outputs, inputs = weight.shape
    padded = F.pad(weight.detach().cpu().bfloat16(), (0, -inputs % STEP_INPUTS, 0, -outputs % PANEL_OUTPUTS))
    panels = padded.unflatten(0, (-1, 2, 16)).unflatten(-1, (-1, 16, 2))  # panel, tile, column; step, pair, half
    return panels.permute(0, 3, 1, 4, 2, 5).flatten(2).contiguous()


def unpack_bf16(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The inverse of `pack_bf16`: (outputs, inputs) bfloat16."""
    panels = packed.unflatten(-1, (2, 16, 16, 2)).permute(0, 2, 4, 1, 3, 5)
    return panels.flatten(3).flatten(0, 2)[:outputs, :inputs]


def bf16_linear(
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
    """Return x W^T + bias, with x and W in bfloat16 and sums in float32.

    What stands before and after such a product in a transformer can be part of the call:
    residual + gelu(norm(x) W^T + bias), all but the product in float32.

    Source: the tokenizer's layers (AliTok, arXiv 2506.05289, section 3.1).

    Devices: CPU. The dtype of the result is `dtype`, also under autocast.

    Gradients: none; differentiating the result is refused, as are forward-mode derivatives. `torch.vmap` runs the
    operator once per element.

    Args:
        x: (..., inputs) float32 or bfloat16, on the CPU.
        weight: the result of `pack_bf16` for W, (ceil(outputs / 32), ceil(inputs / 32), 1024) bfloat16.
        bias: (outputs,) float32, or None.
        outputs: the number of rows of W, >= 0.
        dtype: the dtype of the result, float32 or bfloat16; float32 with a residual.
        norm: a LayerNorm over each row of x, before it is rounded, or None.
        gelu: whether to apply the exact GELU, x Phi(x).
        residual: (..., outputs) float32, which is added, or None.

    Returns:
        (..., outputs) in `dtype`.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for shapes, dtypes or devices that do not fit. The message names the argument, what was expected and
            what was given.
        RuntimeError: where a derivative is asked for.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    return packed_linear("bf16_linear", bf16_linear_reference, x, weight, bias, outputs, dtype, norm, gelu, residual)


@without_autocast
def bf16_linear_reference(
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
    """The definition of `bf16_linear` for (rows, inputs). With `dtype` float64, sums are float64 too."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def product(rows: Tensor) -> Tensor:
        return rows.bfloat16().to(compute) @ unpack_bf16(weight, outputs, rows.shape[1]).to(compute).T

    return with_ends(x, product, bias, dtype, norm_weight, norm_bias, norm_eps, gelu, residual)


@register_fake("bf16_linear")
def _(x, weight, bias, outputs, dtype, norm_weight=None, norm_bias=None, norm_eps=1e-5, gelu=False, residual=None):
    check_one_device(x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    return x.new_empty(x.shape[0], outputs, dtype=dtype)


register_autograd("bf16_linear", refuse_backward("bf16_linear"), lambda ctx, inputs, output: None)
