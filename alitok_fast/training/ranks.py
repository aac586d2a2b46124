"""The processes that train together, as torchrun starts them: one, unless WORLD_SIZE says otherwise."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MAIN = 0


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Process 0, the main one, writes the run's files."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def main(self) -> bool:
        return self.rank == MAIN

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return value if self.world == 1 else self.sum(value) / self.world

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes; a new tensor where there are several."""
        if self.world == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value

    def gathered(self, value: Any) -> list[Any]:
        """What each process gives, in their order, in all of them."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def from_main(self, value: Any) -> Any:
        """What the main process gives; the others' `value` does not count."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, MAIN)
        return held[0]

    def agree(self, flag: bool) -> bool:
        """Whether `flag` holds in any process."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs in the main process first and then in the others, which meet its error as their own."""
        if self.world == 1:
            yield
            return
        if not self.main:
            error = self.from_main(None)
            if error is not None:
                raise RuntimeError(f"process {MAIN} failed: {error}")
            yield
            return
        try:
            yield
        except BaseException as error:
            self.from_main(f"{type(error).__name__}: {error}")
            raise
        self.from_main(None)


@contextlib.contextmanager
def joined(device: torch.device | str) -> Iterator[Ranks]:
    """The processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), over NCCL on GPUs and gloo elsewhere.

    On "cuda" each process takes the GPU of its LOCAL_RANK. A group that a caller has made is used and left as it is.
    Without torchrun: this process alone.
    """
    device = torch.device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    given = dist.is_available() and dist.is_initialized()
    if not given and world == 1:
        yield Ranks(device=device)
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not given:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # what the main process still writes, the others wait for
    finally:
        if not given:
            # The end of a group waits, holding Python's lock, for gloo's threads, which need it to drop what they sent.
            time.sleep(0.1)
            dist.destroy_process_group()


def parallelized(module: nn.Module, ranks: Ranks, parallel: str, layers: list[nn.Module]) -> nn.Module:
    """What to call instead of `module` so that its gradients are means over all processes.

    "ddp" wraps it. "fsdp" spreads its parameters over the processes in place, layer by layer, and returns it.
    """
    if ranks.world == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    if parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # The name that torch 2.13 gave what was `broadcast_buffers`.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    kept: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(module, device_ids=devices, **kept)


@contextlib.contextmanager
def without_sync(module: nn.Module, last: bool) -> Iterator[None]:
    """Gradients stay this process's own inside, but for the `last` micro-batch of a step."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    spread: Any = module
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        spread.set_requires_gradient_sync(last)
    yield


def settle(module: Any) -> None:
    """Spread weights (FSDP2) that a pass without gradients has left whole: what is written to them would be lost."""
    if hasattr(module, "reshard"):
        module.reshard()
