"""What tests and benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected) -> float:
    """Largest deviation, as a share of the largest expected magnitude; computed in float64."""
    expected = torch.as_tensor(expected).double()
    if actual.shape != expected.shape:
        raise ValueError(f"actual: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()
