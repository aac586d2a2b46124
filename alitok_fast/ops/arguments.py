"""What the dispatcher cannot say well about an argument: its type, and whether 64 bits hold it.

Shapes, dtypes, devices and ranges are checked once, in each operator's C++. Without these functions a list in the place
of a tensor, or an integer of twenty digits, would be answered with the operator's whole schema.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

LOWEST_INT64, LARGEST_INT64 = -(2**63), 2**63 - 1
LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def check_tensors(**tensors: object) -> None:
    """Every argument, given by its name, is a tensor. For optional tensors see `check_optional_tensors`.

    Raises:
        TypeError: naming the first argument that is none.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_optional_tensors(**tensors: object) -> None:
    """As `check_tensors`, for arguments that may also be None."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(value).__name__}")


def integer(name: str, value: Any, lowest: int = LOWEST_INT64, largest: int = LARGEST_INT64) -> int:
    """The integer that `value` is: an int, a NumPy integer, or the symbolic size of a traced program.

    Raises:
        TypeError: for anything else; booleans, floats and tensors among it.
        ValueError: outside `lowest`..`largest`.
    """
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not isinstance(value, int) or isinstance(value, bool):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name}: expected an integer, got {_described(value)}")
        value = operator.index(value)
    if not lowest <= value <= largest:
        raise ValueError(f"{name}: expected a number in [{lowest}, {largest + 1}), got {value}")
    return value


def number(name: str, value: Any, lowest: float = -math.inf) -> float:
    """The finite float that `value` is: an int, a float, or a NumPy number, at least `lowest`.

    Raises:
        TypeError: for anything else; strings and tensors among it.
        ValueError: for NaN, infinities and numbers below `lowest`.
    """
    value = real(name, value)
    if value != value or abs(value) == math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if value < lowest:
        raise ValueError(f"{name}: expected a number >= {lowest}, got {value}")
    return value


def real(name: str, value: Any) -> float:
    """As `number`, for what C++ checks the range of: NaN and infinities pass."""
    if isinstance(value, (float, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if isinstance(value, (bool, str, bytes, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {_described(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float holds, got {value}") from None


def check_dtype(name: str, value: object) -> None:
    """Raises TypeError where `value` is not a torch.dtype."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {_described(value)}")


def check_matrix(name: str, value: Any) -> None:
    """A floating-point tensor of two dimensions.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
    """
    check_tensors(**{name: value})
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {str(value.dtype).removeprefix('torch.')}")
    if value.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(value.shape)}")


def as_rows(name: str, x: Tensor) -> Tensor:
    """(..., n) as (rows, n); of any size, 0 among them.

    Raises:
        ValueError: for a tensor without dimensions.
    """
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least 1 dimension, got shape ()")
    return x if x.ndim == 2 else x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def check_one_device(**tensors: Tensor | None) -> None:
    """All tensors lie on the device of the first: for fake kernels, which a meta tensor among others also reaches.

    Raises:
        ValueError: naming the first tensor that does not.
    """
    (first, like), *others = ((name, value) for name, value in tensors.items() if value is not None)
    for name, value in others:
        if value.device != like.device:
            raise ValueError(f"{name}: expected the device of {first}, {like.device}, got {value.device}")


def without_autocast(reference: F) -> F:
    """Decorator of a reference: autocast, of the device of its first tensor, changes none of its precisions."""

    @functools.wraps(reference)
    def run(*arguments: Any, **named: Any) -> Any:
        given = (*arguments, *named.values())
        device = next(argument for argument in given if isinstance(argument, Tensor)).device.type
        if not torch.amp.is_autocast_available(device):  # the meta device has none
            return reference(*arguments, **named)
        with torch.autocast(device, enabled=False):
            return reference(*arguments, **named)

    return run  # type: ignore[return-value]


def _described(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} {value!r}" if isinstance(value, (bool, int, float, str)) and len(repr(value)) <= 40 else kind
