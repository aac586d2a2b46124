"""Mean and covariance of features, gathered batch by batch and process by process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d), divided by count - 1, of `count` feature vectors (None: unknown); float64."""

    count: int | None
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features (n, d), n >= 2. Raises as `MomentSums`."""
        sums = MomentSums()
        sums.add(features)
        return sums.moments()


class MomentSums:
    """Sums from which the moments follow, in float64 and on the CPU; memory for (d, d) numbers, however many come.

    Sums of several processes are put together by `merge`; the order changes the last bits alone.
    """

    def __init__(self) -> None:
        self.count = 0
        self._start(0)

    def add(self, features: Tensor) -> None:
        """Count features (n, d) floating point, n >= 0.

        Raises:
            TypeError: for another dtype.
            ValueError: for another number of dimensions or another d than before, or NaN or infinite values.
        """
        if not features.is_floating_point():
            raise TypeError(f"features: expected floating point, got {features.dtype}")
        self._check_width(features)
        values = features.detach().to("cpu", torch.float64)
        if not values.isfinite().all():
            raise ValueError("features: expected finite numbers, got NaN or infinity")
        if not self.count:
            self._start(values.shape[1])
        self.count += len(values)
        self.total += values.sum(0)
        self.products.addmm_(values.T, values)

    def merge(self, other: MomentSums) -> None:
        """Count what `other` has counted. Raises ValueError for another d."""
        if not other.count:
            return
        if not self.count:
            self._start(len(other.total))
        self._check_width(other.total[None])
        self.count += other.count
        self.total += other.total
        self.products += other.products

    def moments(self) -> Moments:
        """Raises ValueError for fewer than two feature vectors."""
        if self.count < 2:
            raise ValueError(f"features: expected at least 2, got {self.count}")
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Moments(self.count, mean, covariance)

    def _start(self, width: int) -> None:
        self.total, self.products = (torch.zeros(shape, dtype=torch.float64) for shape in ((width,), (width, width)))

    def _check_width(self, features: Tensor) -> None:
        width = len(self.total) if self.count else "d"
        if features.ndim != 2 or (self.count and features.shape[1] != width):
            raise ValueError(f"features: expected shape (n, {width}), got {tuple(features.shape)}")
