"""How many images pass through a tokenizer at a time."""

from __future__ import annotations

import torch

ON_CPU, ELSEWHERE = 4, 64  # a CPU is as fast with few, and the memory that they need can be kept, below
KEPT = 64 << 20


def images_at_a_time(device: torch.device) -> int:
    """More are taken in parts of so many."""
    return ON_CPU if device.type == "cpu" else ELSEWHERE


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep up to 64 MiB that this process has freed, instead of a few hundred KiB.

    Otherwise the memory of a layer goes back to the system, and its pages are made anew for the next layer, which can
    take as long as all the rest. glibc chooses that limit itself, as twice the largest block of at most 32 MiB that it
    mapped and that was freed; other libraries just get and free a block.
    """
    if device.type == "cpu":
        torch.empty(KEPT // 2 - (64 << 10), dtype=torch.uint8, device=device)
