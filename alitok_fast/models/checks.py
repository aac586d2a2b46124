"""Argument checks of the models' public functions: each message names argument, expected and actual."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_tensor(name: str, value: object, dtype: torch.dtype | None, shape: tuple, device: torch.device) -> None:
    """`dtype` None means any floating-point type. `shape` entries: an int, or a string such as "B" for any length."""
    expected_dtype = "floating-point" if dtype is None else str(dtype).removeprefix("torch.")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a {expected_dtype} tensor, got {type(value).__name__}")
    if not (value.is_floating_point() if dtype is None else value.dtype == dtype):
        raise TypeError(f"{name}: expected a {expected_dtype} tensor, got {str(value.dtype).removeprefix('torch.')}")
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_range(name: str, value: Tensor, low: float, high: float, closed: bool = False) -> None:
    """Every element in [low, high), or in [low, high] where `closed`; NaN is outside. Skipped under torch.compile."""
    if torch.compiler.is_compiling() or not value.numel():
        return
    inside = (value >= low) & (value <= high if closed else value < high)
    if not bool(inside.all()):
        bracket = "]" if closed else ")"
        worst = value[~inside].flatten()[0].item()
        raise ValueError(f"{name}: expected values in [{low:g}, {high:g}{bracket}, got {worst:g}")


def check_plain(model: nn.Module) -> None:
    """That the forward pass of `model` is that of its plain weights; ValueError names the part that is not."""
    for name, part in model.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            raise ValueError(f"{name or 'gen'}: expected a module without hooks and with its own forward, got another")
