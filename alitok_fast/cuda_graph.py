"""Recording GPU work once, to launch it again as a whole."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

_capturing = threading.Lock()  # torch allows one capture at a time in a process


def capture(
    device: torch.device, work: Callable[[], None], pool: tuple[int, int] | None = None
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `work`, which reads and writes tensors that stay where they are; replay it with `.replay()`.

    `work` runs once before, so that libraries set themselves up outside the graph. Graphs of one `pool`
    (`torch.cuda.graph_pool_handle`) share their memory: they may not run at the same time. Other threads may use the
    GPU meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with _capturing, torch.cuda.device(device):
        stream = _capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
    return graph


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for each device: torch's own default is of the device that captures first, and libraries keep some memory
    for every stream that they have seen."""
    return torch.cuda.Stream(device)


def storage(module: nn.Module) -> list[Tensor]:
    """What a graph over `module` reads, to be kept beside it: moving a module leaves its old memory to be freed."""
    return [tensor.data for tensor in (*module.parameters(), *module.buffers())]
