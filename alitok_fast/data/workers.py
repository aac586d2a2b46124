"""Work in other processes, by torch's DataLoader: results in order, errors as they were, and none left behind.

Processes come from a fork server. A plain fork has copies of torch's threads that do not run, and of locks that their
owners never release: after a parallel operation in the parent, one in the child hangs (and NCCL over InfiniBand forbids
forks). A fork server has used no threads, and imports torch once for all workers, where spawned processes import it
each. So what workers call must be picklable, and a script that starts them needs `if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from alitok_fast.data.checks import require_count
from alitok_fast.data.pictures import take_turns
from alitok_fast.storage.text import first_line

Item = TypeVar("Item")
Result = TypeVar("Result")
PREFETCH = 2  # batches that each worker makes ahead


class WorkerDiedError(RuntimeError):
    """A worker process that ended by itself; the message says how, and what to do."""


class WorkerResults(Generic[Item, Result]):
    """`collate([read(item) for item in batch])` for each of `batches`, in order, by `workers` processes.

    At most 2 * workers results exist ahead of the consumer. What `read` or `collate` raises is raised here, as it was.
    Raises WorkerDiedError within seconds of a worker's death; TypeError where `read` or `collate` cannot be pickled.
    Close it, or use it in a `with` block: its processes end with it. They ignore Ctrl-C, which is for this process.
    """

    def __init__(
        self,
        read: Callable[[Item], Any],
        batches: Iterable[Sequence[Item]],
        collate: Callable[[list], Result],
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        _require_picklable(read, collate)
        context = multiprocessing.get_context(start_method())
        if start_method() == "forkserver":
            context.set_forkserver_preload([__name__])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more than cores: the caller's choice
            loader: DataLoader = DataLoader(
                _Items(read),
                batch_sampler=batches,  # type: ignore[arg-type]
                num_workers=require_count("workers", workers),
                collate_fn=partial(_gathered, collate),
                pin_memory=pin_memory and torch.cuda.is_available(),
                prefetch_factor=PREFETCH,
                multiprocessing_context=context,
                worker_init_fn=partial(_begin, context.Lock()),
                generator=torch.Generator(),  # else torch's own, whose state a run resumes with, would move on
            )
            self._results: Any = None
            try:
                with _interrupts_later():
                    self._results = iter(loader)
            except BaseException:
                self.close()
                raise
        self._processes: list[Any] = list(self._results._workers)

    def __enter__(self) -> WorkerResults[Item, Result]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._results is None:
            raise StopIteration
        try:
            result = next(self._results)
        except RuntimeError as error:
            dead = [process for process in self._processes if process.exitcode not in (None, 0)]
            self.close()
            if not dead:
                raise
            raise WorkerDiedError(_obituary(dead[0].pid, dead[0].exitcode)) from error
        except BaseException:
            self.close()
            raise
        if isinstance(result, _Failure):
            self.close()
            raise result.error from _Elsewhere(result.trace)
        return result

    def close(self) -> None:
        """End the processes. Nothing more comes."""
        results, self._results = self._results, None
        if results is not None:
            results._shutdown_workers()


def start_method() -> str:
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class _Items(Dataset):
    """A map-style data set whose index is the item. It has no length: the batches end by themselves."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._read(item)
        except Exception as error:
            return _Failure(error)


class _Failure:
    """An exception on its way to another process. torch would send its text alone, after the worker's traceback."""

    def __init__(self, error: Exception) -> None:
        self.trace = traceback.format_exc()
        try:
            pickle.dumps(error)
            self.error = copy.copy(error)  # made again as pickle would
        except Exception:  # an exception of another signature, or that holds what cannot be sent
            self.error = RuntimeError(f"{type(error).__name__}: {error}")


class _Elsewhere(Exception):
    """The traceback of an exception that was raised in a worker process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _gathered(collate: Callable[[list], Any], items: list) -> Any:
    for item in items:
        if isinstance(item, _Failure):
            return item
    try:
        return collate(items)
    except Exception as error:
        return _Failure(error)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C waits until the block is over: half-started workers would complain. The fork server and its children
    inherit that, so that it never reaches them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(turn: Any, number: int) -> None:
    """The first thing in each worker.

    torch's workers watch the process that forked them, which of a fork server lives as long as they do: when the one
    that they work for is killed, they would all stay.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    take_turns(turn)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _require_picklable(*functions: Callable) -> None:
    for function in functions:
        try:
            pickle.dumps(function)
        except Exception as error:
            raise TypeError(
                "read, collate: expected functions that can be sent to worker processes (of a module, or of objects "
                f"that can be pickled), got {first_line(error)}"
            ) from error


def _obituary(process: int | None, status: int) -> str:
    if status < 0:
        try:
            cause = f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            cause = f"was killed by signal {-status}"
    else:
        cause = f"ended with status {status}"
    advice = {
        "SIGKILL": "that is most often the kernel, for want of memory: use fewer workers or smaller batches",
        "SIGBUS": "that is most often a full /dev/shm: enlarge it (docker run --shm-size=8g), or use fewer workers",
        "SIGSEGV": "a picture may have crashed its decoder: `alitok-fast data check` finds it",
    }.get(cause.rsplit(" ", 1)[-1], "its own message is above this one; a script needs `if __name__ == '__main__':`")
    return f"workers: expected worker processes that live, got process {process}, which {cause}; {advice}"
