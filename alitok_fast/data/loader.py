"""Batches of training samples, made in worker processes ahead of the model, in an order that the seed decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from alitok_fast.data.checks import require_count
from alitok_fast.data.order import DataOrder
from alitok_fast.data.reading import read_ahead
from alitok_fast.data.workers import PREFETCH, WorkerResults

Read = Callable[[int, int], tuple["np.ndarray | int", ...]]
WAITING = 0.1  # share of the time from which on the model waits


def stack(samples: list[tuple[np.ndarray | int, ...]]) -> tuple[Tensor, ...]:
    """Samples of equal shapes to tensors of (B, ...) of the same types; whole numbers to (B,) int64."""
    for sample in samples:
        if not isinstance(sample, tuple):
            raise TypeError(f"read: expected a tuple of arrays and whole numbers, got {type(sample).__name__}")
    shapes = {tuple(map(np.shape, sample)) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(f"samples: expected equal shapes, got {' and '.join(map(str, sorted(shapes)[:2]))}")
    return tuple(default_collate([tuple(map(_contiguous, sample)) for sample in samples]))


def _contiguous(part: np.ndarray | int) -> np.ndarray | int:
    # torch takes no mirrored views, and warns of arrays that may not be written.
    return np.require(part, requirements=["C", "W"]) if isinstance(part, np.ndarray) else part


class Loader:
    """Micro-batches `first` to `stop` - 1 of a walk, each a tuple of CPU tensors; one pass, over all its epochs.

    `read(epoch, sample)` makes one sample, a tuple of arrays and whole numbers, from its arguments alone: the batches
    are the same for any number of workers. `order` says which (epoch, sample) are in which micro-batch. `collate`
    makes a batch of a list of samples. With `workers` processes (see data.workers for what they ask of `read`) up to
    2 * workers batches are made ahead; with 0, one thread of this process makes 2, which does as well where there is
    one core. `pin_memory`: tensors from which a CUDA device copies by itself.

    Iteration raises what `read` raises, and WorkerDiedError where a process ends by itself. Use it in a `with` block,
    or call `close`, so that no process stays behind when the walk is left early.
    """

    def __init__(
        self,
        read: Read,
        order: DataOrder,
        first: int,
        stop: int,
        workers: int = 0,
        pin_memory: bool = False,
        collate: Callable[[list], tuple[Tensor, ...]] = stack,
    ) -> None:
        require_count("first", first, least=0)
        if require_count("stop", stop, least=0) < first:
            raise ValueError(f"stop: expected at least first={first}, got {stop}")
        batches = map(order.at, range(first, stop))
        self._batches: Any
        if require_count("workers", workers, least=0):
            self._batches = WorkerResults(partial(_apply, read), batches, collate, workers, pin_memory)
        else:
            self._batches = _in_a_thread(partial(_apply, read), batches, collate, pin_memory)
        self.waited = 0.0
        self._began: float | None = None
        self._ended: float | None = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        before = monotonic()
        try:
            batch = next(self._batches)
        except BaseException:
            self._ended = self._ended or monotonic()
            raise
        now = monotonic()
        if self._began is None:  # starting is no waiting
            self._began = now
        else:
            self.waited += now - before
        return tuple(batch)  # pinning makes lists of tuples

    @property
    def seconds(self) -> float:
        """Wall seconds since the first batch came, up to now or to the end; `waited` of them for further batches."""
        return 0.0 if self._began is None else (self._ended or monotonic()) - self._began

    def leave_out(self, seconds: float) -> None:
        """Do not count the last `seconds`, in which no batch was asked for."""
        if self._began is not None:
            self._began += seconds

    def close(self) -> None:
        """End the workers. Nothing more comes."""
        self._ended = self._ended or monotonic()
        self._batches.close()


def _apply(read: Read, at: tuple[int, int]) -> tuple[np.ndarray | int, ...]:
    return read(*at)


def _in_a_thread(read: Callable, batches: Any, collate: Callable, pin_memory: bool) -> Iterator[tuple[Tensor, ...]]:
    for samples in read_ahead(batches, read, 1, PREFETCH):
        batch = collate(samples)
        yield tuple(part.pin_memory() for part in batch) if pin_memory and torch.cuda.is_available() else batch


def to_floats(images: Tensor) -> Tensor:
    """(B, H, W, 3) or (B, 3, H, W) uint8, on any device, to (B, 3, H, W) float32 in [0, 1] there."""
    if images.dtype != torch.uint8 or images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise ValueError(
            f"images: expected (B, H, W, 3) or (B, 3, H, W) uint8, got {images.dtype} {tuple(images.shape)}"
        )
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def throughput_line(samples_per_second: float, waited: float) -> str:
    """One line on who waits for whom; `waited` is the share of its time that the model spent waiting, 0 to 1."""
    speed = f"{samples_per_second:,.3g}" if samples_per_second < 100 else f"{samples_per_second:,.0f}"
    if waited >= WAITING:
        return (
            f"{speed} samples/s: the model waited for data {waited:.0%} of the time; more workers or cores, a nearer "
            "disk or smaller pictures would speed training up"
        )
    return f"{speed} samples/s: the loader waits for the model ({waited:.0%} of the time the model waited for data)"
