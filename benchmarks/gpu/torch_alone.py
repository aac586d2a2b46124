"""What the GPU and torch do without this library: the ceilings that every later number is held against, the price of a
node of a CUDA graph, and torch's matrix products at the rows of a sampling step."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from alitok_fast.config import GENERATORS
from ceilings import at_rest, measure_ceilings
from gpu.items import Context, Items, Number

NODES = 200
UNITS = {"read_bytes": "B/s"}  # all others are operations a second
KEYS = {"read_bytes": "memory", "bf16_flops": "bf16"}
items = Items()


@items("ceilings")
def ceilings(context: Context) -> list[Number]:
    """Named as the fields of `Ceilings`."""
    measured = at_rest(lambda: measure_ceilings(context.device), tries=1)
    return [
        Number(name, value, UNITS.get(name, "FLOP/s"), key=KEYS.get(name, ""))
        for name, value in dataclasses.asdict(measured).items()
    ]


@items("graph nodes", gpu=True)
def graph_nodes(context: Context) -> list[Number]:
    """A chain of kernels that do next to nothing: what one node costs, however fast its kernel."""
    x = torch.zeros(32, device=context.device)

    def chain() -> None:
        for _ in range(NODES):
            x.add_(1)

    seconds = statistics.median(context.seconds(graphed(chain, context))) / NODES
    return [Number("a node of a graph", seconds * 1e6, "us", key="node")]  # a floor itself


@items("products of few rows")
def products(context: Context) -> list[Number]:
    """B's w1, more of them in turn than a cache holds; on a GPU with cuBLAS's reduced-precision reductions allowed, as
    torch has it, and not."""
    config = GENERATORS["b"]
    layers = context.pick(quick=4, full=2 * config.num_layers)
    weights = [torch.randn(config.hidden, config.width, device=context.device).bfloat16() for _ in range(layers)]
    settings = (True, False) if context.device.type == "cuda" else (None,)
    numbers = []
    for rows in context.pick(quick=(2, 16), full=(2, 16, 128, 512)):
        x = torch.randn(rows, config.width, device=context.device).bfloat16()
        for reduced in settings:
            with reductions(reduced):
                run = graphed(lambda x=x: [F.linear(x, weight) for weight in weights], context)
                label = f"{rows} rows" + {True: ", reduced", False: ", exact", None: ""}[reduced]
                moved = weights[0].nbytes + x.nbytes + x.itemsize * rows * config.hidden
                work = dict(read=moved, flops=2.0 * rows * weights[0].numel())
                key = f"{rows} rows" if rows == 2 and not reduced else ""
                numbers.append(context.timed(label, context.seconds(run), layers, unit="us", key=key, **work))
    return numbers


@items("reduced reductions", gpu=True)
def reduced_reductions(context: Context) -> list[Number]:
    """How far cuBLAS's bfloat16 reductions of split sums move a product with the longest sums of a step (XL's w2)."""
    config = GENERATORS["xl"]
    weight = torch.randn(config.width, config.hidden, device=context.device).bfloat16()
    numbers = []
    for rows in (2, 16):
        x = torch.randn(rows, config.hidden, device=context.device).bfloat16()
        exact = x.double() @ weight.double().T
        for reduced in (True, False):
            with reductions(reduced):
                error = ((F.linear(x, weight).double() - exact).norm() / exact.norm()).item()
            numbers.append(Number(f"error, {rows} rows, {'reduced' if reduced else 'exact'}", error, "relative"))
    return numbers


@contextmanager
def reductions(reduced: bool | None) -> Iterator[None]:
    """cuBLAS's reduced-precision reductions in bfloat16 allowed or not; None leaves them as they are."""
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    if reduced is not None:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before


def graphed(work: Callable[[], object], context: Context) -> Callable[[], object]:
    """`work` as a CUDA graph, so that launches cost the host nothing; as it is on the CPU."""
    if context.device.type != "cuda":
        return work
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


if __name__ == "__main__":
    items.main()
