"""Recording GPU work once, to launch it again as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(device: torch.device, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `work`, which reads and writes tensors that stay where they are; replay it with `.replay()`.

    `work` runs once before, so that libraries set themselves up outside the graph.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        work()
    return graph
