"""Nearest code of a codebook, with what training needs of it, in one pass (arXiv 2506.05289, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alitok_fast._library import load_error, native_enabled


class VQLookup(NamedTuple):
    """What `vq_lookup` returns, for N features, K codes and C channels."""

    quantized: Tensor
    """(N, C) float32, `codebook[indices]`; its gradient passes straight through to `z`."""
    indices: Tensor
    """(N,) int64 in [0, K): the nearest code, the lowest index on a tie."""
    loss: Tensor
    """() float32: mean((e - sg(z))^2) + commitment * mean((sg(e) - z)^2) with e = quantized, sg = stop gradient; 0 for
    N = 0."""
    usage: Tensor
    """(K,) int64: how many features chose each code."""
    closest: Tensor | None
    """(K,) int64 in [0, N): the feature nearest to each code, the lowest index on a tie; -1 for N = 0. None when not
    asked for."""


def vq_lookup_reference(z: Tensor, codebook: Tensor, commitment: float = 0.25, with_closest: bool = True) -> VQLookup:
    """The definition of `vq_lookup`, in the precision of its arguments (float32 or float64)."""
    with torch.autocast(z.device.type, enabled=False):
        distances = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
        indices = distances.argmin(1)
        code = codebook[indices]
        squares = (code - z.detach()).square().sum() + commitment * (code.detach() - z).square().sum()
        usage = torch.zeros(len(codebook), dtype=torch.int64, device=z.device)
        usage = usage.index_add(0, indices, torch.ones_like(indices))
        closest = None
        if with_closest:
            closest = distances.argmin(0) if len(z) else torch.full_like(usage, -1)
        # code + 0, not z + (code - z): the value is the code to the last bit, the gradient goes to z alone.
        quantized = code.detach() + (z - z.detach())
        return VQLookup(quantized, indices, squares / max(z.numel(), 1), usage, closest)


def vq_lookup(z: Tensor, codebook: Tensor, commitment: float = 0.25, with_closest: bool = True) -> VQLookup:
    """The nearest code of each feature: argmin over k of |z|^2 + |e_k|^2 - 2 z.e_k.

    Gradients: `quantized` passes its gradient to `z` unchanged; the first term of `loss` moves the codebook, the
    second, weighted by `commitment`, moves `z`. Differentiable once. The (N, K) distances are never held in memory.

    Always computed in float32, under autocast too: arguments of lower precision are cast, and so is their gradient.
    A distance that is not a number is never the smallest; a feature without any finite distance gets code 0, a code
    without any gets feature 0. (The reference lets NaN win, as argmin does; its indices are in range too.)

    Args:
        z: (N, C) features, floating point, any strides; N may be 0, C >= 1.
        codebook: (K, C) codes, floating point, on the device of `z`; K >= 1.
        commitment: weight of the commitment term.
        with_closest: also find each code's closest feature (the clustering update in training); encoding needs none.

    Raises:
        TypeError: for an argument that is not a floating-point tensor.
        ValueError: for shapes, devices or values that do not fit.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    z, codebook = _as_float32(z, "z"), _as_float32(codebook, "codebook")
    if not native_enabled():
        return vq_lookup_reference(z, codebook, commitment, with_closest)
    quantized, indices, loss, usage, closest = torch.ops.alitok.vq_lookup(z, codebook, commitment, with_closest)
    return VQLookup(quantized, indices, loss, usage, closest if with_closest else None)


def _as_float32(tensor: Tensor, name: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor.float()


def _fake(z: Tensor, codebook: Tensor, commitment: float, with_closest: bool) -> tuple[Tensor, ...]:
    (features, _), codes = z.shape, codebook.shape[0]
    return (
        torch.empty_like(z, memory_format=torch.contiguous_format),
        z.new_empty(features, dtype=torch.int64),
        z.new_empty(()),
        z.new_empty(codes, dtype=torch.int64),
        z.new_empty(codes if with_closest else 0, dtype=torch.int64),
    )


def _fake_backward(grad_quantized, grad_loss, z, codebook, indices, commitment) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(z, memory_format=contiguous), torch.empty_like(codebook, memory_format=contiguous)


def _save_for_backward(ctx, inputs, output) -> None:
    z, codebook, ctx.commitment, _ = inputs
    ctx.save_for_backward(z, codebook, output[1])


def _backward(ctx, grad_quantized, _indices, grad_loss, _usage, _closest):
    gradients = torch.ops.alitok.vq_lookup_backward(grad_quantized, grad_loss, *ctx.saved_tensors, ctx.commitment)
    return *gradients, None, None


def _backward_of_backward(ctx, *_):
    raise RuntimeError("vq_lookup: expected to be differentiated once, got a second time; use_reference() allows it")


if load_error is None:
    torch.library.register_fake("alitok::vq_lookup")(_fake)
    torch.library.register_fake("alitok::vq_lookup_backward")(_fake_backward)
    torch.library.register_autograd("alitok::vq_lookup", _backward, setup_context=_save_for_backward)
    torch.library.register_autograd("alitok::vq_lookup_backward", _backward_of_backward)
