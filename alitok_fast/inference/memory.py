"""How many images fit: what a batch costs while it is drawn, and the largest that the memory holds."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from alitok_fast.config import GeneratorConfig
from alitok_fast.models.kv_cache import KVCache

USABLE = 0.9  # of the free memory: allocators round up, and others want some too


class CachedModel(Protocol):
    """`models.Generator`, `PackedGenerator` and `QuantizedGenerator` are."""

    config: GeneratorConfig
    device: torch.device
    cache_dtype: torch.dtype


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for one image of a batch (its cache, activations and logits), bytes that are free, and what follows."""

    bytes_per_image: int
    bytes_available: int

    def batch_bytes(self, images: int) -> int:
        """What a batch of so many images costs."""
        return images * self.bytes_per_image

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
        gen: a generator or decoder (of a `Pipeline`: `pipe.generator`, `pipe.sampler.model`).
        device: "cpu" or "cuda", whose free memory counts; None takes that of `gen`.
        guided: with guidance, which doubles the rows.
        kv_dtype: of the cache; None is what `gen` takes by itself.

    Raises:
        TypeError: `gen` is neither.
        ValueError: a device of another type, or one that is not there.
    """
    if not hasattr(gen, "cache_dtype"):
        raise TypeError(f"gen: expected a generator or decoder, got {type(gen).__name__}")
    device = gen.device if device is None else torch.device(device)
    config, rows = gen.config, 2 if guided else 1
    # Activations, in float32: the residual, the normed rows, the widest product and its input, three times the logits.
    activations = 4 * (2 * config.width + 2 * max(3 * config.width, 2 * config.hidden) + 3 * config.codebook_size)
    per_row = KVCache.bytes_per_row(config, kv_dtype or gen.cache_dtype) + activations
    return MemoryPlan(rows * per_row, available_bytes(device))


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`; on the CPU within this process's control group."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: expected one that is there, got {device}: torch finds no CUDA device")
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        raise ValueError(f"device: expected cpu or cuda, whose free memory is known, got {device}")
    return min(_free_memory(), *_left_in_groups())


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: what is installed has to do
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the limits of containers leave (cgroup v2), from this process's group upwards; at least one number."""
    left = [sys.maxsize]
    try:
        name = next(line[3:].strip() for line in own.read_text().splitlines() if line.startswith("0::"))
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / "memory.max").is_file():
                limit = (folder / "memory.max").read_text().strip()
                if limit != "max":
                    used, cache = int((folder / "memory.current").read_text()), _reclaimable(folder / "memory.stat")
                    left.append(max(int(limit) - used + cache, 0))
            if folder == root:
                break
    except (OSError, StopIteration, ValueError):
        pass  # no such control groups here
    return left


def _reclaimable(stat: Path) -> int:
    """Bytes of files in memory that give way when memory is short."""
    return sum(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("inactive_file "))
