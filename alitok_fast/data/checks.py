"""Checks of plain arguments, by name."""

from __future__ import annotations

import operator


def require_count(name: str, value: int, least: int = 1) -> int:
    """`value` as an int; ValueError naming the argument where it is no whole number of at least `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return number


def require_choice(name: str, value: object, choices: tuple) -> None:
    """ValueError naming the argument and its choices where `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
