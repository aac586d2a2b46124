"""Reading pictures in several threads, ahead of whoever uses them. Pillow decodes and resizes outside the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from alitok_fast.data.checks import require_count

Item = TypeVar("Item")
Read = TypeVar("Read")
MOST_WORKERS = 8


def default_workers() -> int:
    """One thread per core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores))


def default_processes() -> int:
    """Worker processes for a `Loader`: one per core, at most 8; 0 where there is one core, which a thread fills too.

    The processes that torchrun starts on a machine (LOCAL_WORLD_SIZE) share its cores.
    """
    workers = default_workers() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return workers if workers > 1 else 0


def read_ahead(
    batches: Iterable[Sequence[Item]], read: Callable[[Item], Read], workers: int, ahead: int = 1
) -> Iterator[list[Read]]:
    """For each batch the list of `read(item)`, in order, while up to `ahead` further batches are being read."""
    pool = ThreadPoolExecutor(require_count("workers", workers))
    waiting: deque[list[Future]] = deque()
    try:
        for batch in batches:
            waiting.append([pool.submit(read, item) for item in batch])
            if len(waiting) > ahead:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)
