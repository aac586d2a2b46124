"""Intervals over seeds: Student's quantiles from the tables, and what one value alone cannot say."""

from __future__ import annotations

import pytest

from alitok_fast.evaluation.intervals import difference, spread, t_quantile

TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423, 100: 1.9840, 101: 1.9837}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(TABLE[freedom], abs=5e-5)
    assert t_quantile(4, 0.99) == pytest.approx(4.6041, abs=5e-5)


def test_spread_of_three_seeds() -> None:
    mean, std, half = spread([1.40, 1.46, 1.43])
    assert (mean, std) == (pytest.approx(1.43), pytest.approx(0.03))
    assert half == pytest.approx(4.3027 * 0.03 / 3**0.5, rel=1e-4)
    assert spread([2.0]) == (2.0, None, None)


def test_difference_of_two_models() -> None:
    apart, half = difference([1.40, 1.46, 1.43], [1.50, 1.54])
    # pooled variance (2 * 0.0009 + 0.0008) / 3
    assert apart == pytest.approx(0.09)
    assert half == pytest.approx(3.1824 * (0.0026 / 3) ** 0.5 * (1 / 3 + 1 / 2) ** 0.5, rel=1e-4)
    one, wide = difference([1.5], [1.40, 1.46, 1.43])  # one value takes the other side's deviation
    assert one == pytest.approx(-0.07) and wide == pytest.approx(4.3027 * 0.03 * (1 + 1 / 3) ** 0.5, rel=1e-4)
    assert difference([1.5], [1.4]) == (pytest.approx(-0.1), None)


@pytest.mark.parametrize(("freedom", "level"), [(0, 0.95), (3, 1.0), (3, 0.0)])
def test_bad_arguments_are_named(freedom: int, level: float) -> None:
    with pytest.raises(ValueError, match="freedom, level: expected at least 1, and between 0 and 1, got"):
        t_quantile(freedom, level)
    with pytest.raises(ValueError, match="values: expected at least one, got none"):
        difference([], [1.0])
