"""What linear layers with packed weights share: what stands before and after the product in a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled
from alitok_fast.ops.arguments import as_rows, check_dtype, check_optional_tensors, check_tensors, integer, number
from alitok_fast.ops.derivatives import refuse_transforms

NO_GRADIENTS = "packed weights are for inference"


class RowNorm(NamedTuple):
    """A LayerNorm over each row."""

    weight: Tensor
    """(inputs,) float32."""
    bias: Tensor
    """(inputs,) float32."""
    eps: float = 1e-5
    """A number >= 0, added to the variance."""


def packed_linear(
    operator: str,
    reference: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    dtype: torch.dtype,
    norm: RowNorm | None,
    gelu: bool,
    residual: Tensor | None,
) -> Tensor:
    """Check the types, and call `alitok::<operator>` or its reference on rows."""
    check_tensors(x=x, weight=weight)
    check_optional_tensors(bias=bias, residual=residual)
    check_dtype("dtype", dtype)
    outputs, rows = integer("outputs", outputs), as_rows("x", x)
    shape = (*x.shape[:-1], outputs)
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"residual: expected shape {shape}, got {tuple(residual.shape)}")
        residual = as_rows("residual", residual)
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    check_optional_tensors(norm_weight=norm_weight, norm_bias=norm_bias)
    ends = (norm_weight, norm_bias, number("norm_eps", eps, lowest=0), bool(gelu), residual)
    refuse_transforms(
        operator, NO_GRADIENTS, x=x, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual
    )
    if native_enabled():
        return getattr(torch.ops.alitok, operator)(rows, weight, bias, outputs, dtype, *ends).view(shape)
    out = reference(rows, weight, bias, outputs, dtype, *ends)
    if out.requires_grad:
        out.register_hook(refuse_backward(operator))  # the derivative of rounding is not the one that anybody wants
    return out.view(shape)


def with_ends(
    x: Tensor,
    product: Callable[[Tensor], Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    gelu: bool,
    residual: Tensor | None,
) -> Tensor:
    """The definition of all but the product: residual + gelu(product(norm(x)) + bias)."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = x.to(compute)
    if norm_weight is not None and norm_bias is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight.to(compute), norm_bias.to(compute), norm_eps)
    out = product(x)
    if bias is not None:
        out = out + bias
    if gelu:
        out = F.gelu(out)
    return (out if residual is None else residual + out).to(dtype)


def refuse_backward(operator: str) -> Callable[..., Any]:
    """The derivative of such an operator."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{operator}: expected inputs without gradients, got some to differentiate; {NO_GRADIENTS}")

    return refuse
