"""How far samples are from real images, in the features of a small classifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alitok_fast.evaluation.classifier import SmallClassifier


@torch.inference_mode()
def features(model: SmallClassifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """What the last layer reads, (n, 128) float64, of images (n, 3, H, W), uint8 or floats in [0, 1]."""
    scale = 255 if images.dtype == torch.uint8 else 1
    body = [model.head[:-1](model.features((part.float() / scale).mean(1, keepdim=True) * 2 - 1))
            for part in images.split(batch_size)]  # fmt: skip
    return torch.cat(body).double()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (n, d), (m, d): Heusel et al. 2017, equation 6.

    That is FID's formula; with other features than Inception's its values compare only with each other.
    """
    for name, values in (("first", first), ("second", second)):
        if values.ndim != 2 or len(values) < 2:
            raise ValueError(f"{name}: expected shape (n, d) with n >= 2, got {tuple(values.shape)}")
    (m1, c1), (m2, c2) = ((values.double().mean(0), values.double().T.cov()) for values in (first, second))
    root = _symmetric_root(c1)
    mixed = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * mixed)


def standard_error(statistic: Callable[[Tensor], float], values: Tensor, rounds: int = 50, seed: int = 0) -> float:
    """Of a statistic of values (n, ...): its standard deviation over resamplings of `values` with replacement."""
    rng = torch.Generator().manual_seed(seed)
    resampled = [statistic(values[torch.randint(len(values), (len(values),), generator=rng)]) for _ in range(rounds)]
    return float(torch.tensor(resampled, dtype=torch.float64).std())


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
