"""What several sets of images, drawn with several seeds, say of a measure, and of a difference between two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95


class Spread(NamedTuple):
    """Mean, standard deviation and half-width of the 95% interval of the mean; None where there is one value."""

    mean: float
    std: float | None
    half: float | None


class Difference(NamedTuple):
    """second - first, and the half-width of its 95% interval; None where neither side has several values."""

    difference: float
    half: float | None


def spread(values: Sequence[float]) -> Spread:
    """Of values that are as good as drawn independently. Raises ValueError for none."""
    if not values:
        raise ValueError("values: expected at least one, got none")
    mean, count = math.fsum(values) / len(values), len(values)
    if count == 1:
        return Spread(mean, None, None)
    std = math.sqrt(_squares(values) / (count - 1))
    return Spread(mean, std, t_quantile(count - 1) * std / math.sqrt(count))


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Of two measures' means, with Student's interval, which takes both to have one standard deviation: so a single
    value may be compared with several. Raises ValueError where one side is empty."""
    apart = spread(second).mean - spread(first).mean
    freedom = len(first) + len(second) - 2
    if not freedom:
        return Difference(apart, None)
    std = math.sqrt((_squares(first) + _squares(second)) / freedom)
    return Difference(apart, t_quantile(freedom) * std * math.sqrt(1 / len(first) + 1 / len(second)))


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """t such that |T| < t with probability `level`, T of Student's distribution with `freedom` >= 1 degrees."""
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(f"freedom, level: expected at least 1, and between 0 and 1, got {freedom}, {level}")
    low, high = 0.0, math.pi / 2  # the angle whose tangent is t / sqrt(freedom)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _inside(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _squares(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values)
