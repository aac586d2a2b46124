"""A CUDA device without a GPU: CPU tensors that say they lie on one, streams that only keep books, and races found.

    fake = FakeCuda(monkeypatch)
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with fake.thread("first", one):
        decode(tokens)
    with fake.thread("second", two):
        decode(tokens)
    assert fake.races == []

Work is done at once, on the CPU; what is kept for each stream is a vector clock: how much of every stream has surely
ended before the work that it is given next. Events, waits and reading back move these clocks as CUDA orders things. Two
accesses to one storage, one of them a write, that the clocks do not order are a race, whatever came out this time; so
is memory that goes back to its stream's allocator while another stream may still use it. A graph's replay does again
what was recorded, and is one access to all that the recording touched: the memory pool and the cuBLAS workspaces too.

`thread` stands for a thread of the host by name, so that a test may interleave several by hand; in a real thread, too,
it has to be entered. What one thread has waited for another does not know: nothing here sees the host's own locks.

Not as on a GPU: recording runs the work once, and `torch.cuda` has only what this package uses.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
GEMMS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")
READ_BACK = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")
Clock = dict["Stream", int]


def merge(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


def storages(*values) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, torch.Tensor)}


class Stream:
    def __init__(self, fake: FakeCuda, name: str) -> None:
        self.fake, self.name, self.clock = fake, name, {}

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.fake.sweep()
        merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    def __init__(self) -> None:
        self.clock: Clock = {}
        self.fake: FakeCuda | None = None

    def record(self, stream: Stream) -> None:
        stream.fake.sweep()
        self.fake, self.clock = stream.fake, dict(stream.clock)

    def synchronize(self) -> None:
        if self.fake is not None:
            self.fake.sweep()
            merge(self.fake.host, self.clock)


class Memory:
    """A storage, a graph's pool or a cuBLAS workspace, and when each stream last read and wrote it."""

    def __init__(self, name: str, stream: Stream | None) -> None:
        self.name, self.stream = name, stream  # `stream` None: not from the allocator
        self.freed = False
        self.accesses: dict[tuple[Stream, bool], tuple[int, str]] = {}


class Graph:
    """torch.cuda.CUDAGraph"""

    def __init__(self, fake: FakeCuda) -> None:
        self.fake, self.pool = fake, None
        self.work: list[tuple] = []
        self.reads: set[Memory] = set()
        self.writes: set[Memory] = set()

    def replay(self) -> None:
        self.fake.access(self.fake.stream, "replay", self.reads, self.writes)
        with self.fake.unseen(), torch.inference_mode():
            for func, args, kwargs, results in self.work:
                given = storages(args, kwargs)
                for result, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                    if result is not None and result.untyped_storage()._cdata not in given:
                        result.copy_(new)


class _Device(TorchFunctionMode):
    """Tensors say that they are on the GPU, and what is asked to go there stays."""

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.fake.local.unseen or func is torch.device:
            return func(*args, **kwargs)
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return DEVICE
        if func in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy):
            self.fake.stream.synchronize()
        args, kwargs = tree_map(_to_cpu, (list(args), kwargs))
        return func(*args, **kwargs)


def _to_cpu(value):
    is_cuda = (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.startswith("cuda")
    )
    return torch.device("cpu") if is_cuda else value


class _Accesses(TorchDispatchMode):
    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.fake.local.unseen:
            with self.fake.unseen():
                self.fake.launched(func, args, kwargs, result)
        return result


class FakeCuda:
    def __init__(self, monkeypatch) -> None:
        self.races: list[str] = []
        self.memory: dict[int, tuple[StorageWeakRef, Memory]] = {}
        self.workspaces: dict[tuple[str, Stream], Memory] = {}
        self.pools: dict[object, Memory] = {}
        self.hosts: dict[str, Clock] = {}
        self.ended: Clock = {}
        self.lock = threading.RLock()
        self.local = _Local()
        self.streams: list[Stream] = []
        self.default = self.new_stream()
        self._patch(monkeypatch)

    # ---- what a test uses ----

    @contextlib.contextmanager
    def thread(self, name: str, stream: Stream | None = None) -> Iterator[None]:
        """Be the host's thread of this name, whose current stream is `stream`."""
        local = self.local
        before, local.name = local.name, name
        try:
            with self.use(stream or self.default), _Device(self), _Accesses(self):
                yield
        finally:
            local.name = before

    def finish(self) -> None:
        """All work ends, and all threads know."""
        self.sweep()
        for stream in self.streams:
            merge(self.ended, stream.clock)

    # ---- books ----

    @property
    def stream(self) -> Stream:
        return self.local.stream or self.default

    @property
    def host(self) -> Clock:
        """What the thread knows to have ended."""
        return self.hosts.setdefault(self.local.name, {})

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        before, self.local.unseen = self.local.unseen, True
        try:
            yield
        finally:
            self.local.unseen = before

    def launched(self, func, args, kwargs, result) -> None:
        """Work was given to the current stream, or to the graph that is being recorded."""
        name, schema = func._schema.name.partition("::")[2], func._schema
        written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if not written and storages(result) and storages(result) <= storages(args, kwargs):
            return  # a view, if only this time
        self.sweep()
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        graph, stream = self.local.graph, self.stream
        reads = {self.of(t, name, None) for t in tree_leaves(given) if isinstance(t, torch.Tensor)}
        writes = {self.of(t, name, None) for a in written for t in tree_leaves(given.get(a.name)) if t is not None}
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        writes |= {self.of(t, name, stream) for t in made if not (graph and self.is_new(t))}
        if name in GEMMS:
            writes.add(self.workspace(stream, graph))
        if graph is not None:
            assert name not in READ_BACK, f"{name} waits for the device while a stream is recorded"
            graph.work.append((func, args, kwargs, result))
            graph.reads |= reads
            graph.writes |= writes | {graph.pool}
            for storage in (tensor.untyped_storage() for tensor in made if self.is_new(tensor)):
                self.memory[storage._cdata] = (StorageWeakRef(storage), graph.pool)
            return
        self.access(stream, name, reads, writes)
        if name in READ_BACK:
            stream.synchronize()

    def access(self, stream: Stream, name: str, reads: set[Memory], writes: set[Memory]) -> None:
        with self.lock:
            merge(stream.clock, self.host)
            merge(stream.clock, self.ended)
            stream.clock[stream] = now = stream.clock.get(stream, 0) + 1
            for memory in reads | writes:
                writing = memory in writes
                if memory.freed:
                    self.races.append(f"{name} on {stream.name} uses {memory.name}, which was freed")
                for (other, wrote), (time, what) in memory.accesses.items():
                    if (wrote or writing) and stream.clock.get(other, 0) < time:
                        verb = ("reads", "writes")
                        self.races.append(
                            f"{name} on {stream.name} {verb[writing]} {memory.name}, "
                            f"which {what} on {other.name} {verb[wrote]}, in no order"
                        )
                memory.accesses[stream, writing] = now, name

    def sweep(self) -> None:
        """Storages that are gone went back to the allocator of their stream."""
        with self.lock:
            for key, (reference, memory) in list(self.memory.items()):
                if reference.expired():
                    del self.memory[key]
                    self.free(memory)

    def free(self, memory: Memory) -> None:
        if memory.stream is None:
            return
        memory.freed = True
        known = dict(memory.stream.clock)
        merge(known, self.host)
        merge(known, self.ended)
        for (other, _), (time, what) in memory.accesses.items():
            if other is not memory.stream and known.get(other, 0) < time:
                self.races.append(
                    f"{memory.name} goes back to {memory.stream.name} while {what} on {other.name} may still use it"
                )

    def is_new(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata not in self.memory

    def of(self, tensor: torch.Tensor, name: str, stream: Stream | None) -> Memory:
        """The memory of a tensor; new memory was allocated for the current work, or, with None, before all."""
        storage = tensor.untyped_storage()
        with self.lock:
            if storage._cdata not in self.memory:
                described = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} of {name}"
                self.memory[storage._cdata] = (StorageWeakRef(storage), Memory(described, stream))
            return self.memory[storage._cdata][1]

    def workspace(self, stream: Stream, graph: Graph | None) -> Memory:
        """Of cuBLAS, one for each handle, which is a thread's, and stream; from the pool where a graph is recorded."""
        key = self.local.name, stream
        if key not in self.workspaces:
            self.workspaces[key] = Memory("a cuBLAS workspace", None if graph else stream)
        return self.workspaces[key]

    # ---- torch.cuda ----

    def new_stream(self, device=None) -> Stream:
        self.streams.append(Stream(self, f"stream {len(self.streams)}"))
        return self.streams[-1]

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.local.stream = self.local.stream, stream
        try:
            yield
        finally:
            self.local.stream = before

    @contextlib.contextmanager
    def record(self, graph: Graph, pool=None, stream=None, capture_error_mode="global") -> Iterator[None]:
        self.synchronize()
        graph.pool = self.pools.setdefault(pool or object(), Memory("a graph's memory pool", None))
        with self.use(stream):
            self.local.graph = graph
            try:
                yield
            finally:
                self.local.graph = None

    def synchronize(self, device=None) -> None:
        for stream in self.streams:
            stream.synchronize()

    def clear_workspaces(self) -> None:
        for memory in self.workspaces.values():
            self.free(memory)
        self.workspaces.clear()

    def _patch(self, monkeypatch) -> None:
        gibibyte = 2**30
        fakes = {
            "Stream": self.new_stream,
            "Event": Event,
            "CUDAGraph": lambda: Graph(self),
            "graph": self.record,
            "graph_pool_handle": object,
            "stream": self.use,
            "current_stream": lambda device=None: self.stream,
            "current_device": lambda: DEVICE.index,
            "device": lambda device: contextlib.nullcontext(),
            "synchronize": self.synchronize,
            "is_available": lambda: True,
            "get_device_capability": lambda device=None: (9, 0),
            "mem_get_info": lambda device=None: (gibibyte, gibibyte),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspaces, raising=False)


class _Local(threading.local):
    name, unseen = "main", False
    stream: Stream | None = None
    graph: Graph | None = None
