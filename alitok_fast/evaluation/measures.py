"""How far two sets of feature vectors are apart: the measures of generated images, for features of any network.

With Inception's pooled features these are FID, KID, precision and recall, with its logits the Inception Score; with
other features their values compare only with each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alitok_fast.evaluation.moments import Moments

BLOCK = 1024  # rows whose distances to all others are held at a time


class Estimate(NamedTuple):
    """Mean and standard deviation over subsets or splits."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Shares, 0 to 1: of samples among the reference, and of the reference among samples."""

    precision: float
    recall: float


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); Heusel et al. 2017 (arXiv 1706.08500), equation 6.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric. Such
    eigenvalues take seconds for 2,048 features, and covariances of few images may be singular. Raises ValueError for
    different numbers of features.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"second: expected {len(first.mean)} features, got {len(second.mean)}")
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (first.mean - second.mean).square().sum()
    return float(apart + first.covariance.trace() + second.covariance.trace() - 2 * mixed)


def kernel_distance(
    first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Estimate:
    """The squared maximum mean discrepancy with the kernel (x . y / d + 1)^3, unbiased, over random subsets.

    Binkowski et al. 2018 (arXiv 1801.01401), section 4. The subsets are those of torch-fidelity with the same seed.

    Args:
        first: (n, d) floating point.
        second: (m, d) floating point.
        subsets: how many pairs of subsets, >= 1.
        subset_size: vectors of each, from 2 to min(n, m).
        seed: of the choice of subsets.

    Raises:
        ValueError: for other shapes or sizes.
    """
    _check_pair(first, second)
    if not 2 <= subset_size <= min(len(first), len(second)):
        raise ValueError(
            f"subset_size: expected 2 to {min(len(first), len(second))}, the size of the smaller set, got {subset_size}"
        )
    if subsets < 1:
        raise ValueError(f"subsets: expected at least 1, got {subsets}")
    rng = np.random.RandomState(seed)
    results = []
    for _ in range(subsets):
        x, y = (
            values[torch.from_numpy(rng.choice(len(values), subset_size, replace=False))].double()
            for values in (first, second)
        )
        within = sum(_off_diagonal_mean(_kernel(values, values)) for values in (x, y))
        results.append(float(within - 2 * _kernel(x, y).mean()))
    return Estimate(float(np.mean(results)), float(np.std(results)))


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = None) -> Estimate:
    """exp of the mean divergence of each image's classes from those of its split.

    Salimans et al. 2016 (arXiv 1606.03498), section 4.

    Args:
        logits: (n, classes) floating point, n >= splits.
        splits: equal parts of the images, in order.
        seed: None takes the images as they come, as the ADM suite does; a number shuffles them before, as
            torch-fidelity does with 2020. In order, classes that stand together in one split score lower.

    Raises:
        ValueError: for another shape or number of splits.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: expected shape (n, classes), got {tuple(logits.shape)}")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits: expected 1 to {len(logits)}, the number of images, got {splits}")
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))]
    scores = []
    for i in range(splits):
        part = logits[i * len(logits) // splits : (i + 1) * len(logits) // splits].double().log_softmax(1)
        marginal = part.logsumexp(0) - np.log(len(part))
        scores.append(float((part.exp() * (part - marginal)).sum(1).mean().exp()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> PrecisionRecall:
    """Shares of vectors that lie in the other set's manifold: no farther from one of its vectors than that one's k-th
    nearest neighbour in its own set; Kynkaanniemi et al. 2019 (arXiv 1904.06991), equation 1.

    Distances are float32, of vectors around the reference's mean; memory for `BLOCK` rows of them.

    Args:
        samples: (n, d) floating point, n > k.
        reference: (m, d) floating point, m > k. The ADM suite takes 10,000 images.
        k: neighbours, >= 1.

    Raises:
        ValueError: for other shapes, or too few vectors.
    """
    _check_pair(samples, reference)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    for name, values in (("samples", samples), ("reference", reference)):
        if len(values) <= k:
            raise ValueError(f"{name}: expected more than k = {k}, got {len(values)}")
    centre = reference.double().mean(0)
    drawn, real = (torch.empty(values.shape, device=values.device) for values in (samples, reference))
    for near, values in ((drawn, samples), (real, reference)):
        for at in range(0, len(values), BLOCK):
            near[at : at + BLOCK] = values[at : at + BLOCK].double() - centre
    within_real, within_drawn = _radii(real, k), _radii(drawn, k)
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(drawn.split(BLOCK), within_drawn.split(BLOCK), strict=True):
        squares = _squared_distances(rows, real)
        precise += int((squares <= within_real).any(1).sum())
        recalled |= (squares <= radii[:, None]).any(0)
    return PrecisionRecall(precise / len(drawn), int(recalled.sum()) / len(real))


def standard_error(statistic: Callable[[Tensor], float], values: Tensor, rounds: int = 50, seed: int = 0) -> float:
    """Of a statistic of values (n, ...): its standard deviation over resamplings of `values` with replacement."""
    rng = torch.Generator().manual_seed(seed)
    resampled = [statistic(values[torch.randint(len(values), (len(values),), generator=rng)]) for _ in range(rounds)]
    return float(torch.tensor(resampled, dtype=torch.float64).std())


def _check_pair(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"features: expected shapes (n, d) and (m, d), got {tuple(first.shape)}, {tuple(second.shape)}"
        )


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(matrix: Tensor) -> Tensor:
    return (matrix.sum() - matrix.trace()) / (len(matrix) * (len(matrix) - 1))


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    squares = first.square().sum(1, keepdim=True) + second.square().sum(1)
    return torch.addmm(squares, first, second.T, alpha=-2)


def _radii(vectors: Tensor, k: int) -> Tensor:
    """(n,) squared distance of each vector to its k-th nearest neighbour among the others.

    Of its own distances, each vector's to itself is the smallest. Of a pair of blocks both get theirs at once.
    """
    nearest = vectors.new_full((len(vectors), k + 1), torch.inf)
    blocks = [slice(at, at + BLOCK) for at in range(0, len(vectors), BLOCK)]
    for number, rows in enumerate(blocks):
        for columns in blocks[number:]:
            squares = _squared_distances(vectors[rows], vectors[columns])
            pair = [(rows, squares), (columns, squares.T)]
            for block, found in pair[: 1 if rows == columns else 2]:
                nearest[block] = torch.cat([nearest[block], found], 1).topk(k + 1, largest=False).values
    return nearest.amax(1)
