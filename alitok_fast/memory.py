"""How many images fit: what a batch costs while it is drawn, and the largest that the memory holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import torch

from alitok_fast.config import GeneratorConfig
from alitok_fast.models.kv_cache import KVCache

USABLE = 0.9  # of the free memory: allocators round up, and others want some too


class CachedModel(Protocol):
    """`models.Generator`, `decoding.Decoder` and `models.quantize.QuantizedGenerator` are."""

    config: GeneratorConfig
    device: torch.device
    cache_dtype: torch.dtype


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for one image of a batch (its cache, activations and logits), bytes that are free, and what follows."""

    bytes_per_image: int
    bytes_available: int

    @property
    def largest_batch(self) -> int:
        """Images that fit together; 0 when not even one does."""
        return int(USABLE * self.bytes_available) // self.bytes_per_image


def plan(
    gen: CachedModel,
    device: torch.device | str | None = None,
    guided: bool = True,
    kv_dtype: torch.dtype | None = None,
) -> MemoryPlan:
    """What drawing images with `gen` costs, beyond the model itself, and how many fit at a time.

    Args:
        gen: a generator or decoder.
        device: whose free memory counts; None takes that of `gen`.
        guided: with guidance, which doubles the rows.
        kv_dtype: of the cache; None is what `gen` takes by itself.
    """
    device = gen.device if device is None else torch.device(device)
    config, rows = gen.config, 2 if guided else 1
    # Activations, in float32: the residual, the normed rows, the widest product and its input, three times the logits.
    activations = 4 * (2 * config.width + 2 * max(3 * config.width, 2 * config.hidden) + 3 * config.codebook_size)
    per_row = KVCache.bytes_per_row(config, kv_dtype or gen.cache_dtype) + activations
    return MemoryPlan(rows * per_row, available_bytes(device))


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: what is installed has to do
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
