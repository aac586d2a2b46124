"""Linear layers of a sampling step with what surrounds them: the norm before, the gate, the residual addition after.

On a GPU a step of few rows is a chain of short kernels, each of which waits for the one ahead. Fused, a block of the
generator is five of them instead of nine, and the weights of each are on their way before the one ahead has ended.

There are two kernels. In that for few rows, a block has all inputs of its outputs. In the other (clusters; sm_90 and
later), up to eight blocks share the inputs. The first has been measured on an H100; the second no GPU has run yet.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_autograd, register_fake
from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.arguments import check_one_device
from alitok_fast.ops.derivatives import refuse_gradients
from alitok_fast.ops.quantized_linear import quantized_linear
from alitok_fast.ops.swiglu import swiglu

FUSED_ROWS = 32
"""Up to so many rows the kernel for few rows is used; beyond, without clusters, torch's matrix product. It would take
128 rows too, but with 8-bit weights it was half as fast there, on an H100, as torch with bfloat16."""

CLUSTER_ROWS = {
    torch.bfloat16: range(9, 129),
    torch.float16: range(9, 129),
    torch.int8: range(1, 129),
    torch.float8_e4m3fn: range(1, 129),
}
"""Rows for which it is the one of clusters, where the device has them. The other one needs so many registers for 8-bit
weights that no block of the next kernel fits beside it, and was slower with them than with bfloat16 on an H100."""

NORMED_INPUTS, INPUTS_MULTIPLE = 1280, 64
"""Inputs of a row that the kernels can normalise, and what their number must be a multiple of."""

SHARED_INPUTS, OUTPUTS_MULTIPLE = 4096, 8
"""Inputs that a cluster can share, and what the number of outputs must be a multiple of there."""

NO_GRADIENTS = "it is for sampling; use_reference() allows it"


class LinearWeights(NamedTuple):
    """Of a linear layer: weight (outputs, inputs); scale of 8-bit weights (`quantize_weight`); bias (outputs,).

    On CUDA the fused kernel reads them, and the norm's weight, before the kernel ahead has ended: they may not be
    results of this package's operators.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


def norm_linear(
    x: Tensor,
    delta: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    layer: LinearWeights,
    gate: LinearWeights | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of a residual stream, and a linear layer of it, or two with a gate.

    Source: the generator's pre-norm blocks (AliTok, arXiv 2506.05289, section 3).

    Devices: CPU and CUDA; one kernel on CUDA for few rows of bfloat16 or float16 (`fused_rows`), else several.
    Gradients: none; where the kernel is used, differentiating is refused.

    Args:
        x: (R, width) float32, the residual stream; `delta` (R, width) or None is what must still be added to it.
        norm_weight: (width,), in the dtype of activations.
        eps: added to the mean square.
        layer: the layer. The result is layer(normed), or silu(gate(normed)) * layer(normed).
        gate: a layer without bias, or None.

    Returns:
        The residual stream with `delta` added, (R, width) float32, and the layer's result (R, outputs) in the dtype of
        `norm_weight`.
    """
    rows = x.shape[0]
    if delta is None and _fits(rows, x.dtype == torch.float32 and x.shape[1] <= NORMED_INPUTS, norm_weight, layer):
        gated = (None, None) if gate is None else gate[:2]
        refuse_gradients("norm_linear", NO_GRADIENTS, x=x, norm_weight=norm_weight, **layer._asdict())
        clusters = _by_clusters(rows, layer)
        return x, torch.ops.alitok.fused_linear(x, norm_weight, eps, *layer[:2], *gated, layer.bias, clusters)
    x, normed = add_rms_norm(x, delta, norm_weight, eps)
    out = whole_linear(normed, layer)
    return x, out if gate is None else swiglu(whole_linear(normed, gate), out)


def embed_norm_linear(
    ids: Tensor, table: Tensor, norm_weight: Tensor, eps: float, layer: LinearWeights
) -> tuple[Tensor, Tensor]:
    """Rows of an embedding, and `norm_linear` of them: how a step begins, in one kernel where `norm_linear` is one.

    Devices, gradients: as `norm_linear`.

    Args:
        ids: (R,) int64, rows of the table. The fused kernel makes NaN of others.
        table: (vocabulary, width), contiguous.
        norm_weight, eps, layer: as for `norm_linear`.

    Returns:
        The rows (R, width), and the layer's result (R, outputs) in the dtype of `norm_weight`.
    """
    fits = table.dtype == torch.float32 and table.shape[1] <= NORMED_INPUTS and table.is_contiguous()
    if _fits(ids.shape[0], fits, norm_weight, layer):
        weights = layer._asdict()
        refuse_gradients("embed_norm_linear", NO_GRADIENTS, table=table, norm_weight=norm_weight, **weights)
        clusters = _by_clusters(ids.shape[0], layer)
        return torch.ops.alitok.fused_linear_embed(ids, table, norm_weight, eps, *layer, clusters)
    # By index and not as a module: of few rows, torch's kernel for that takes several times as long.
    return norm_linear(table[ids], None, norm_weight, eps, layer)


def linear_add(residual: Tensor, x: Tensor, layer: LinearWeights) -> tuple[Tensor, Tensor | None]:
    """A linear layer whose result belongs to a residual stream: the stream, and what must still be added to it.

    Devices, gradients: as `norm_linear`. One kernel adds at once, and writes to `residual`; else the result is left to
    the norm that follows.

    Args:
        residual: (R, outputs) float32. May be written.
        x: (R, inputs).
        layer: the layer.

    Returns:
        The stream, and None or (R, outputs) in the dtype of `x`.
    """
    if _fits(x.shape[0], residual.dtype == torch.float32, x, layer):
        refuse_gradients("linear_add", NO_GRADIENTS, residual=residual, x=x, **layer._asdict())
        torch.ops.alitok.fused_linear_add(x, *layer, residual, _by_clusters(x.shape[0], layer))
        return residual, None
    return residual, whole_linear(x, layer)


def whole_linear(x: Tensor, layer: LinearWeights) -> Tensor:
    """The layer by itself."""
    weight, scale, bias = layer
    return F.linear(x, weight, bias) if scale is None else quantized_linear(x, weight, scale, bias)


def fused_rows(weight_dtype: torch.dtype, device: torch.device) -> int:
    """Up to so many rows a fused kernel multiplies weights of that dtype on a device; 0 on a CPU.

    What a layer's shape or dtypes may forbid is not counted.
    """
    if device.type != "cuda" or weight_dtype not in CLUSTER_ROWS:
        return 0
    return CLUSTER_ROWS[weight_dtype][-1] if has_clusters(device) else FUSED_ROWS


@functools.cache
def has_clusters(device: torch.device) -> bool:
    """Whether the device has them, and the environment does not forbid their kernel."""
    return os.environ.get("ALITOK_CLUSTERS") != "0" and torch.cuda.get_device_capability(device) >= (9, 0)


def _by_clusters(rows: int, layer: LinearWeights) -> bool:
    outputs, inputs = layer.weight.shape
    fits = rows in CLUSTER_ROWS[layer.weight.dtype] and inputs <= SHARED_INPUTS and outputs % OUTPUTS_MULTIPLE == 0
    return fits and has_clusters(layer.weight.device)


def _fits(rows: int, fits: bool, activations: Tensor, layer: LinearWeights) -> bool:
    weight, dtype = layer.weight, activations.dtype
    return (
        fits
        and weight.is_cuda
        and native_enabled()
        and weight.dtype in CLUSTER_ROWS
        and (0 < rows <= FUSED_ROWS or _by_clusters(rows, layer))
        and (dtype == weight.dtype if layer.scale is None else dtype == torch.bfloat16)
        and weight.shape[1] % INPUTS_MULTIPLE == 0
        and weight.is_contiguous()
        and not torch.is_autocast_enabled(weight.device.type)
    )


def fused_linear_reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    layer: LinearWeights,
    gate: LinearWeights | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition, in the precision of the arguments: the result, or `residual` with it added."""
    if norm_weight is not None:
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)).to(norm_weight.dtype) * norm_weight
    out = whole_linear(x, layer)
    if gate is not None:
        out = F.silu(whole_linear(x, gate)) * out
    return out if residual is None else residual + out


@register_fake("fused_linear")
def _(x, norm_weight, norm_eps, weight, scale, gate, gate_scale, bias, clusters):
    check_one_device(x=x, norm_weight=norm_weight, weight=weight, scale=scale, gate=gate, bias=bias)
    return weight.new_empty(x.shape[0], weight.shape[0], dtype=x.dtype if norm_weight is None else norm_weight.dtype)


@register_fake("fused_linear_embed")
def _(ids, table, norm_weight, norm_eps, weight, scale, bias, clusters):
    check_one_device(ids=ids, table=table, norm_weight=norm_weight, weight=weight, scale=scale, bias=bias)
    rows = ids.shape[0]
    return table.new_empty(rows, table.shape[1]), norm_weight.new_empty(rows, weight.shape[0])


@register_fake("fused_linear_add")
def _(x, weight, scale, bias, residual, clusters):
    check_one_device(x=x, weight=weight, scale=scale, bias=bias, residual=residual)


def _refuse(ctx, *_):
    raise RuntimeError(f"fused_linear: expected inputs without gradients; {NO_GRADIENTS}")


for _name in ("fused_linear", "fused_linear_embed"):
    register_autograd(_name, _refuse, lambda ctx, inputs, output: None)
