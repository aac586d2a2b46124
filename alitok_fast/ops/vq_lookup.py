"""Codebook lookup: the nearest code of each feature, and what training needs with it, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alitok_fast._library import native_enabled, register_autograd, register_fake
from alitok_fast.ops.arguments import check_one_device, check_tensors, number, without_autocast
from alitok_fast.ops.derivatives import differentiated_once, refuse_transforms


class VQLookup(NamedTuple):
    """What `vq_lookup` returns, for N features, K codes and C channels."""

    quantized: Tensor
    """(N, C) float32, `codebook[indices]`; its gradient passes straight through to `z`."""
    indices: Tensor
    """(N,) int64 in [0, K): the nearest code of each feature, the lowest index on a tie."""
    loss: Tensor
    """() float32: mean((e - sg(z))^2) + commitment * mean((sg(e) - z)^2) with e = quantized, sg = stop gradient; 0 for
    N = 0."""
    usage: Tensor
    """(K,) int64: how many features chose each code."""
    closest: Tensor | None
    """(K,) int64 in [0, N): the feature nearest to each code, the lowest index on a tie; -1 for N = 0. None when not
    asked for."""


@without_autocast
def vq_lookup_reference(z: Tensor, codebook: Tensor, commitment: float = 0.25, with_closest: bool = True) -> VQLookup:
    """The definition of `vq_lookup`, in the precision of its arguments (float32 or float64)."""
    distances = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
    indices = distances.argmin(1)
    code = codebook[indices]
    squares = (code - z.detach()).square().sum() + commitment * (code.detach() - z).square().sum()
    usage = torch.zeros(codebook.shape[0], dtype=torch.int64, device=z.device)
    usage = usage.index_add(0, indices, torch.ones_like(indices))
    closest = None
    if with_closest:
        closest = distances.argmin(0) if z.shape[0] > 0 else torch.full_like(usage, -1)
    # code + 0, not z + (code - z): the value is the code to the last bit, the gradient goes to z alone.
    quantized = code.detach() + (z - z.detach())
    return VQLookup(quantized, indices, squares / max(z.numel(), 1), usage, closest)


def vq_lookup(z: Tensor, codebook: Tensor, commitment: float = 0.25, with_closest: bool = True) -> VQLookup:
    """Find the nearest code of each feature: argmin over k of |z|^2 + |e_k|^2 - 2 z.e_k.

    The result is always computed in float32, under autocast too: arguments of lower precision are cast, and so is their
    gradient. The (N, K) distances are never held in memory. A distance that is not a number is never the smallest: a
    feature without any finite distance gets code 0, a code without any gets feature 0. (The reference lets NaN win, as
    argmin does; its indices are in range too.)

    Source: the tokenizer's quantizer (AliTok, arXiv 2506.05289, section 3), with the losses of VQ-VAE (arXiv
    1711.00937, equation 3).

    Devices: CPU and CUDA.

    Gradients: with respect to `z` and `codebook`, once. `quantized` passes its gradient to `z` unchanged (straight
    through); the first term of `loss` moves the codebook, and the second, weighted by `commitment`, moves `z`. Second
    derivatives, forward-mode derivatives and those of `torch.func` are refused. `torch.vmap` runs the operator once per
    element.
    The backward pass reads `indices` again: one that is out of range by then is an error on the CPU; on CUDA, where
    looking would stop the stream, the gradient of its feature is NaN, and it counts in no code's.

    Args:
        z: (N, C) features, floating point, any strides; N may be 0, C >= 1.
        codebook: (K, C) codes, floating point, on the device of `z`; K >= 1.
        commitment: finite weight of the commitment term.
        with_closest: whether to find each code's closest feature too, which the clustering update in training needs;
            encoding does not.

    Returns:
        VQLookup: `quantized` (N, C) float32, `indices` (N,) int64 in [0, K), `loss` () float32, `usage` (K,) int64 and
        `closest` (K,) int64 in [0, N), or None. On a tie the lowest index wins.

    Raises:
        TypeError: for an argument of another type, and for tensors that are not floating point.
        ValueError: for shapes, devices or values that do not fit. The message names the argument, what was expected and
            what was given.
        RuntimeError: for a derivative that the operator does not have.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    z, codebook = _as_float32(z, "z"), _as_float32(codebook, "codebook")
    commitment, with_closest = number("commitment", commitment), bool(with_closest)
    if not native_enabled():
        return vq_lookup_reference(z, codebook, commitment, with_closest)
    refuse_transforms("vq_lookup", z=z, codebook=codebook)
    quantized, indices, loss, usage, closest = torch.ops.alitok.vq_lookup(z, codebook, commitment, with_closest)
    return VQLookup(quantized, indices, loss, usage, closest if with_closest else None)


def _as_float32(tensor: Tensor, name: str) -> Tensor:
    check_tensors(**{name: tensor})
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor.float()


@register_fake("vq_lookup")
def _(z, codebook, commitment, with_closest):
    check_one_device(z=z, codebook=codebook)
    (features, _), codes = z.shape, codebook.shape[0]
    return (
        torch.empty_like(z, memory_format=torch.contiguous_format),
        z.new_empty(features, dtype=torch.int64),
        z.new_empty(()),
        z.new_empty(codes, dtype=torch.int64),
        z.new_empty(codes if with_closest else 0, dtype=torch.int64),
    )


@register_fake("vq_lookup_backward")
def _(grad_quantized, grad_loss, z, codebook, indices, commitment):
    check_one_device(z=z, grad_quantized=grad_quantized, grad_loss=grad_loss, codebook=codebook, indices=indices)
    contiguous = torch.contiguous_format
    return torch.empty_like(z, memory_format=contiguous), torch.empty_like(codebook, memory_format=contiguous)


def _save_for_backward(ctx, inputs, output) -> None:
    z, codebook, ctx.commitment, _ = inputs
    ctx.save_for_backward(z, codebook, output[1])


def _backward(ctx, grad_quantized, _indices, grad_loss, _usage, _closest):
    gradients = torch.ops.alitok.vq_lookup_backward(grad_quantized, grad_loss, *ctx.saved_tensors, ctx.commitment)
    return *gradients, None, None


register_autograd("vq_lookup", _backward, _save_for_backward)
differentiated_once("vq_lookup")
