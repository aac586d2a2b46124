"""What sections of a report consist of, and numbers as they are written in them."""

from __future__ import annotations

from dataclasses import dataclass, field

UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
NOT_MEASURED = "-"


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    """Names of functions in `plots`: HTML only."""


def number(value: float, digits: int = 3) -> str:
    """To `digits` significant digits, without an exponent."""
    if value == 0 or not abs(value) < float("inf"):
        return str(value)
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:.{digits}g}"


def seconds(value: float) -> str:
    """With the unit that reads best."""
    unit, scale = next(((unit, scale) for unit, scale in UNITS if value >= scale), UNITS[-1])
    return f"{number(value / scale)} {unit}"


def spread(times: dict[str, float]) -> str:
    if times["rounds"] == 1:
        return f"{seconds(times['median'])} (1 round)"
    return (
        f"{seconds(times['median'])} ({seconds(times['fastest'])} to {seconds(times['slowest'])}, "
        f"{times['rounds']} rounds)"
    )
