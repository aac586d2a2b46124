"""Recording GPU work once, to launch it again as a whole; and whose turn it is to use what such work needs."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_capturing = threading.Lock()  # torch allows one capture at a time in a process


class Turn:
    """A `with` block for calls that use the same memory: they run one after the other, on host and device.

    A lock alone orders what threads ask of a GPU, not what it does: threads may use streams of their own. So on a CUDA
    device a turn ends with an event on its stream, however it ends, and the stream of the next turn waits for it before
    it gets any work. The host waits for nothing. The first turn waits for what the current stream had been given when
    this object was made, such as weights that were still being copied: make it after them.

    Raises RuntimeError where a thread begins a turn inside its own, which would wait for itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._done: torch.cuda.Event | None = None
        self._mark()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, (self._device,)  # a copy is a turn of its own

    def __enter__(self) -> None:
        if self._holder == threading.get_ident():
            raise RuntimeError("turn: expected calls of one object one after the other, got one from inside another")
        self._lock.acquire()
        try:
            if self._done is not None:
                torch.cuda.current_stream(self._device).wait_event(self._done)
            self._holder = threading.get_ident()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_) -> None:
        try:
            self._mark()
        finally:
            self._holder = None
            self._lock.release()

    def wait(self) -> None:
        """Wait until the device has done what turns asked for so far, this thread's own included."""
        if self._holder == threading.get_ident():
            self._mark()
        if self._done is not None:
            self._done.synchronize()

    def outlives(self, owner: object) -> None:
        """Let `owner`, whose memory turns use, be freed only when the device has done what they asked for.

        Freed memory goes to the stream that it was allocated for, which knows nothing of a turn on another one.
        """
        if self._done is not None:
            weakref.finalize(owner, self.wait).atexit = False

    def _mark(self) -> None:
        if self._device.type == "cuda":
            self._done = torch.cuda.current_stream(self._device).record_event(self._done)


def capture(device: torch.device, work: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `work`, which reads and writes tensors that stay where they are; replay it with `.replay()`.

    `work` runs once before, so that libraries set themselves up outside the graph. Graphs of one `pool`
    (`torch.cuda.graph_pool_handle`) share their memory: they may not run at the same time. Other threads may use the
    GPU meanwhile; the cuBLAS workspaces that torch keeps for their streams are allocated anew (`_own_workspace`). What
    cuBLAS splits into partial sums it adds up in float32 (`_exact_sums`).
    """
    graph = torch.cuda.CUDAGraph()
    with _capturing, torch.cuda.device(device), _exact_sums(), _nothing_collected():
        stream = _capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                work()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        with _own_workspace(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
    return graph


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for each device: torch's own default is of the device that captures first, and libraries keep some memory
    for every stream that they have seen."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Python's collector may drop another graph, or wait for the device (`Turn.outlives`): not while recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _own_workspace() -> Iterator[None]:
    """Graphs recorded inside take the workspace of cuBLAS out of their own pool, and nobody else gets it."""
    # torch keeps one for each handle (a thread's) and stream, so graphs recorded on one stream would share it, and a
    # stream for each owner is no way out: torch hands out 32 again and again, and newer releases free the workspaces of
    # a stream with the first of its graphs. Forgotten before and after, as torch/_inductor/cudagraph_trees.py does, it
    # is allocated while recording, out of the graph's own pool, and nothing else finds it.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextlib.contextmanager
def _exact_sums() -> Iterator[None]:
    """Partial sums of one product (split-K) are added up in float32, also where its operands have 16 bits.

    By default torch lets cuBLAS do that in bfloat16 or float16; guidance multiplies the error, up to 16 times. The
    setting counts when a product is recorded, so replays need none. Nor do single steps: on a CUDA device the sampling
    loop replays graphs only. The switch is the process's: what other threads launch meanwhile is as exact.
    """
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    # A newer torch has a second part, whether sums may be split at all; to set the first alone would reset it.
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)) for name in names}
    try:
        for name, (_, split) in before.items():
            setattr(matmul, name, False if split is None else (False, split))
        yield
    finally:
        for name, (allowed, split) in before.items():
            setattr(matmul, name, allowed if split is None else (allowed, split))


def storage(module: nn.Module) -> list[Tensor]:
    """What a graph over `module` reads, to be kept beside it: moving a module leaves its old memory to be freed."""
    return [tensor.data for tensor in (*module.parameters(), *module.buffers())]
