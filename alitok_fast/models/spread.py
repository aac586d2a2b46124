"""Parameters that may be spread over several processes (DTensor, as fully_shard makes them)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together in each process where it is spread over them."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def assign(target: Any, value: Tensor) -> None:
    """Copy a whole `value`, the same in all processes, into `target`."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)
