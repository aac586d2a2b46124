"""What tests and benchmarks share: inputs with the awkward cases in them, and comparisons with an honest bound."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alitok_fast.inference.step_model import StepModel
from alitok_fast.models.kv_cache import KVCache

EPSILON = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}
"""Largest relative error of rounding to a dtype."""


def relative_error(actual: Tensor, expected) -> float:
    """Largest deviation, as a share of the largest expected magnitude; computed in float64."""
    expected = torch.as_tensor(expected).double()
    if actual.shape != expected.shape:
        raise ValueError(f"actual: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def step_logits(model: StepModel, ids: Tensor, cache: KVCache, width: int = 1) -> Tensor:
    """(R, n, K): the logits after each of the inputs (R, n) of whole sequences, `width` of them a pass."""
    parts = []
    for begin in range(0, ids.shape[1], width):
        part = ids[:, begin : begin + width].contiguous()
        parts.append(model.step(part, cache, torch.full((len(ids),), begin, device=ids.device)))
    return torch.cat(parts, 1)


def vq_inputs(features: int, codes: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (features, channels) and a codebook (codes, channels), float32, normal; with equal codes and equal
    features far apart, so that there are ties with one right answer."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(features, channels, generator=generator)
    codebook = torch.randn(codes, channels, generator=generator)
    for rows in (z, codebook):
        copies = rows[len(rows) // 2 :: 3]
        copies.copy_(rows[: len(copies)].clone())
    return z, codebook


def squared_distances(z: Tensor, codebook: Tensor) -> Tensor:
    """(N, K) float64, exact to about 1e-15 of |z|^2 + |e|^2."""
    z, codebook = z.double(), codebook.double()
    return z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T


def assert_nearest(z: Tensor, codebook: Tensor, indices: Tensor, closest: Tensor | None = None) -> None:
    """`indices` are each feature's nearest code and `closest` each code's closest feature: exactly, lowest index on a
    tie, but for candidates whose distances float32 cannot tell apart."""
    distances = squared_distances(z, codebook)
    # Twice the worst error of C + 2 roundings, each relative to a partial sum of |z|^2 / 2 + |e|^2 / 2 + |z||e|.
    size = (z.double().norm(dim=1, keepdim=True) + codebook.double().norm(dim=1)).square()
    bound = 2 * (z.shape[1] + 2) * EPSILON[torch.float32] * size
    _assert_smallest(indices, distances, bound, "indices")
    if closest is not None:
        _assert_smallest(closest, distances.T, bound.T, "closest")


def _assert_smallest(indices: Tensor, values: Tensor, bound: Tensor, name: str) -> None:
    """In each row the value at the index is within `bound` of the least, and no equal value comes before it."""
    assert indices.shape == values.shape[:1] and indices.dtype == torch.int64, name
    if len(indices) == 0:
        return
    assert 0 <= int(indices.min()) and int(indices.max()) < values.shape[1], f"{name}: out of range"
    chosen = values.gather(1, indices[:, None])
    slack = (bound.gather(1, indices[:, None]) + bound.gather(1, values.argmin(1, keepdim=True))).squeeze(1)
    excess = chosen.squeeze(1) - values.amin(1)
    assert bool((excess <= slack).all()), f"{name}: {int((excess > slack).sum())} are not the nearest"
    # Equal rows give values that agree to float64's rounding, far closer than any others.
    first = ((values - chosen).abs() <= 1e-13 * (1 + chosen.abs())).int().argmax(1)
    assert torch.equal(first, indices), f"{name}: {int((first != indices).sum())} are not the lowest index of a tie"


class ReadsBack(TorchDispatchMode):
    """Counts reads of a tensor's value by the host, each of which would stop a CUDA stream and break its capture."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))
