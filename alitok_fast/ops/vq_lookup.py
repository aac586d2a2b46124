"""Nearest code of a codebook, with what training needs of it, in one pass (arXiv 2506.05289, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class VQLookup(NamedTuple):
    """What `vq_lookup` returns, for N features, K codes and C channels."""

    quantized: Tensor
    """(N, C) float32, `codebook[indices]`; its gradient passes straight through to `z`."""
    indices: Tensor
    """(N,) int64 in [0, K): the nearest code, the lowest index on a tie."""
    loss: Tensor
    """() float32: mean((e - sg(z))^2) + commitment * mean((sg(e) - z)^2), with e = quantized and sg = stop gradient; 0 for N = 0."""
    usage: Tensor
    """(K,) int64: how many features chose each code."""
    closest: Tensor | None
    """(K,) int64 in [0, N): the feature nearest to each code, the lowest index on a tie; -1 for N = 0. None when not asked for."""


def vq_lookup_reference(
    z: Tensor, codebook: Tensor, commitment: float = 0.25, with_closest: bool = True
) -> VQLookup:
    """The definition of `vq_lookup`, in the precision of its arguments (float32 or float64)."""
    distances = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
    indices = distances.argmin(1)
    code = codebook[indices]
    elements = max(z.numel(), 1)
    loss = (code - z.detach()).square().sum() / elements + commitment * (code.detach() - z).square().sum() / elements
    usage = torch.zeros(len(codebook), dtype=torch.int64, device=z.device).index_add(0, indices, torch.ones_like(indices))
    closest = None
    if with_closest:
        closest = distances.argmin(0) if len(z) else torch.full_like(usage, -1)
    # code + 0, not z + (code - z): the value is the code to the last bit, the gradient goes to z alone.
    return VQLookup(code.detach() + (z - z.detach()), indices, loss, usage, closest)


def vq_lookup(z: Tensor, codebook: Tensor, commitment: float = 0.25, with_closest: bool = True) -> VQLookup:
    """The nearest code of each feature: argmin over k of |z|^2 + |e_k|^2 - 2 z.e_k.

    Gradients: `quantized` passes its gradient to `z` unchanged; the first term of `loss` moves the codebook, the
    second, weighted by `commitment`, moves `z`. The (N, K) matrix of distances is never held in memory.

    Always computed in float32, under autocast too: arguments of lower precision are cast, and so is their gradient.
    A distance that is not a number is never the smallest; a feature without any finite distance gets code 0, a code
    without any gets feature 0.

    Args:
        z: (N, C) features; N may be 0.
        codebook: (K, C) codes, on the device of `z`.
        commitment: weight of the commitment term.
        with_closest: also find each code's closest feature (clustering update in training); encoding can do without.

    Raises:
        TypeError: for an argument that is not floating point.
        ValueError: for shapes or devices that do not fit.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    from alitok_fast._library import native_enabled

    z, codebook = z.float(), codebook.float()
    if not native_enabled():
        return vq_lookup_reference(z, codebook, commitment, with_closest)
    quantized, indices, loss, usage, closest = torch.ops.alitok.vq_lookup(z, codebook, commitment, with_closest)
    return VQLookup(quantized, indices, loss, usage, closest if with_closest else None)
