"""How many images fit: what a batch costs while it is sampled, and the largest that the memory holds."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from alitok_fast.config import GeneratorConfig
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.inference.step_model import StepModel
from alitok_fast.models.kv_cache import KVCache

USABLE = 0.9  # of the free memory: allocators round up, and others want some too


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for one image of a batch (its cache, activations and logits), bytes that are free, and what they allow.

    A batch of more than `few_images` also costs `bytes_for_many`, once: 8-bit weights that are written out for it and
    kept (`QuantizedGenerator`). That is 0 for other weights, and for those that are written out already.
    """

    bytes_per_image: int
    bytes_available: int
    few_images: int = 0
    bytes_for_many: int = 0

    def batch_bytes(self, images: int) -> int:
        """What a batch of so many images costs."""
        return images * self.bytes_per_image + (self.bytes_for_many if images > self.few_images else 0)

    @property
    def largest_batch(self) -> int:
        """Images that fit together; 0 when not even one does."""
        usable = int(USABLE * self.bytes_available)
        few, many = (left // self.bytes_per_image for left in (usable, usable - self.bytes_for_many))
        return max(many, min(few, self.few_images), 0)


def plan(
    gen: StepModel,
    device: torch.device | str | None = None,
    guided: bool = True,
    kv_dtype: torch.dtype | None = None,
    window: int = 1,
) -> MemoryPlan:
    """What sampling images with `gen` costs, beyond the model itself, and how many fit at a time.

    Args:
        gen: a generator, packed or not (of a `Pipeline`: `pipe.generator`, `pipe.sampler.model`).
        device: "cpu" or "cuda", whose free memory counts; None takes that of `gen`.
        guided: with guidance, which doubles the rows.
        kv_dtype: of the cache; None is what `gen` takes by itself.
        window: of sampling, which with 8-bit weights says from how many images on these are written out.

    Raises:
        TypeError: `gen` is not a generator.
        ValueError: a device of another type, or one that is not there.
    """
    if not isinstance(gen, StepModel):
        raise TypeError(f"gen: expected a generator, got {type(gen).__name__}")
    device = gen.device if device is None else torch.device(device)
    config, rows = gen.config, 2 if guided else 1
    per_row = KVCache.bytes_per_slot(config, kv_dtype or gen.cache_dtype) + row_bytes(config)
    few, once = 0, 0
    if isinstance(gen, QuantizedGenerator):
        few, once = gen.most_inputs // (rows * window), gen.wide_bytes
    return MemoryPlan(rows * per_row, available_bytes(device), few, once)


def row_bytes(config: GeneratorConfig) -> int:
    """The activations of a row of a pass."""
    # In float32: the residual, the normed rows, the widest product and its input, three times the logits.
    return 4 * (2 * config.width + 2 * max(3 * config.width, 2 * config.hidden) + 3 * config.codebook_size)


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
    """What the limits of containers leave, from this process's group upwards; at least one number."""
    left = [sys.maxsize]
    for folder, version in _groups(root, own):
        limit, used, cache = _FILES[version]
        with contextlib.suppress(OSError, ValueError):  # no such control groups here, or no limit ("max")
            allowed = int((folder / limit).read_text())
            held = int((folder / used).read_text()) - _reclaimable(folder / "memory.stat", cache)
            left.append(max(allowed - held, 0))
    return left


_FILES = {  # of a version: the limit, what is used, and what of that are files in memory that give way
    2: ("memory.max", "memory.current", "inactive_file "),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
}


def _groups(root: Path, own: Path) -> Iterator[tuple[Path, int]]:
    """The folders of this process's control groups that limit memory, inner before outer, and their version."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, name in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        group = top / name.lstrip("/")
        while group != top and not group.is_dir():  # a container sees its own group as the top
            group = group.parent
        for folder in (group, *group.parents):
            yield folder, 1 if controllers else 2
            if folder == top:
                break


def _reclaimable(stat: Path, key: str) -> int:
    """Bytes of files in memory that give way when memory is short."""
    return sum(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith(key))
