"""Sequences that are sampled together although each began when it liked: continuous batching."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from alitok_fast.inference.cuda_graph import Turn, capture
from alitok_fast.inference.memory import MemoryPlan, plan, row_bytes
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.state import MOST_COLUMNS, begin, new_state
from alitok_fast.inference.step_model import StepModel
from alitok_fast.inference.window import WindowChoice
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.ops.decode import SampleState

OF_ROWS = ("ids", "positions", "slots")  # of a SampleState; the others are of images
OF_IMAGES = tuple(f.name for f in dataclasses.fields(SampleState) if f.name not in OF_ROWS)
MOST_PASSES = 256  # of a turn


@dataclass(eq=False)
class Slot:
    """An image among those of a `SlotLoop`.

    Attributes:
        sequences: of the cache, the conditional one and with guidance the unconditional one.
        prompt: tokens that were given.
        known: tokens that are known by now.
    """

    sequences: tuple[int, ...]
    prompt: int
    known: int
    _place: int = field(repr=False)  # among the images of the state


class SlotLoop:
    """Images that join when they like, leave when they are done, and take their passes together meanwhile.

    The tokens of an image are those that `sample` gives, whatever else is sampled: bit for bit on a CPU, and on a GPU
    as far as its kernels give the same logits for other numbers of rows (docs/precision.md).

    On a CUDA device each number of images among 1, 2, 4, 8, ... and each window has a CUDA graph, in which the images
    that are missing rest; they are captured when first needed, or by `warm_up`. On a CPU resting rows cost nothing, so
    one size is enough.

    Args:
        model: a generator, packed for this device (`prepare`).
        sequences: of the cache, 1 or more; an image takes two, and one where guidance is 0.
        kv_dtype: dtype of the cache, as for `Sampler`.
        windows: tokens that a pass may settle for an image, chosen from these by what they cost and settle.
        seconds: that a turn of passes takes, about: what joins or leaves waits so long.

    Raises:
        MemoryError: the cache does not fit.
    """

    def __init__(
        self,
        model: StepModel,
        sequences: int,
        kv_dtype: torch.dtype | None = None,
        windows: Sequence[int] = (1,),
        seconds: float = 0.02,
    ) -> None:
        self.model, self.sequences, self._seconds = model, sequences, seconds
        try:
            model.expect(sequences)
            self.cache = model.new_cache(sequences, kv_dtype, MOST_COLUMNS)
        except RuntimeError as error:
            size = sequences * KVCache.bytes_per_slot(model.config, kv_dtype or model.cache_dtype)
            raise MemoryError(
                f"sequences: expected a cache that fits in memory, got {sequences} sequences, {size / 2**30:.1f} GiB"
            ) from error
        self._free = list(range(sequences))[::-1]
        self._windows = tuple(windows)
        self._choices: dict[int, WindowChoice] = {}  # by the number of images
        self._passes_per_turn = 1
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._read_by_graphs: list[Tensor] = []
        self._states: dict[int, SampleState] = {}
        self._sizes = [sequences]
        if model.device.type == "cuda":
            self._sizes = [2**n for n in range((sequences - 1).bit_length())] + [sequences]
        self.turn_of_device = Turn(model.device)
        self.turn_of_device.outlives(self)
        self._state = self._state_of(self._sizes[0])
        self._slots: list[Slot | None] = [None] * self._sizes[0]

    @property
    def active(self) -> list[Slot]:
        """The images that have joined and not left, in no particular order."""
        return [slot for slot in self._slots if slot is not None]

    def has_room(self, guided: bool) -> bool:
        """Whether an image can join."""
        return len(self._free) >= (2 if guided else 1)

    @property
    def sequences_in_use(self) -> int:
        return self.sequences - len(self._free)

    def warm_up(self) -> None:
        """On a CUDA device, capture all graphs; while nothing is sampled."""
        for size in self._sizes:
            self._state_of(size)

    @torch.no_grad()
    def join(
        self,
        label: int,
        schedule: Tensor | None,
        params: SamplingParams,
        image_id: int,
        prompt_tokens: Tensor | None = None,
        guesses: Tensor | None = None,
    ) -> Slot:
        """Begin an image of class `label`. `params` are resolved; there must be room.

        `schedule` is (N,), the guidance scale of each step, and None without guidance; `prompt_tokens` (n <= N,) and
        `guesses` (N,) as for `begin`, without a batch.
        """
        guided, device = schedule is not None, self.model.device
        sequences = tuple(self._free.pop() for _ in range(2 if guided else 1))
        try:
            with self.turn_of_device:
                one = new_state(self.model, 1, guided, torch.tensor(sequences, device=device))
                known = begin(
                    self.model,
                    one,
                    self.cache,
                    torch.tensor([label], device=device),
                    schedule,
                    params,
                    torch.tensor([image_id], device=device),
                    None if prompt_tokens is None else prompt_tokens[None],
                    None if guesses is None else guesses[None],
                )
                place = self._free_place()
                self._put(one, place)
        except BaseException:
            self._free.extend(sequences)
            raise
        slot = Slot(sequences, 0 if prompt_tokens is None else len(prompt_tokens), known, place)
        self._slots[place] = slot
        return slot

    @torch.no_grad()
    def leave(self, slot: Slot) -> None:
        """Stop sampling an image, done or not, and free its sequences."""
        images = len(self._slots)
        self._state.positions[slot._place :: images] = -1
        self._slots[slot._place] = None
        self._free.extend(slot.sequences)

    @torch.no_grad()
    def turn(self) -> int:
        """Do some passes for all images: about as many as fit in `seconds`, none after the first image is done; returns
        how many."""
        slots = [slot for slot in self.active if slot.known < self.model.config.num_tokens]
        if not slots:
            return 0
        choice = self._choices.setdefault(len(slots), WindowChoice(self._windows))
        window, passes = choice.next()
        # A pass settles a token at least, and no more than its window.
        left = min(-(-(self.model.config.num_tokens - slot.known) // window) for slot in slots)
        passes = min(passes, self._passes_per_turn, left)
        before = [(slot, slot.known) for slot in slots]
        started = time.perf_counter()
        with self.turn_of_device:
            self._fit()
            self._advance(passes, window)
            self._read_progress()
        seconds = time.perf_counter() - started
        if all(known >= slot.prompt for slot, known in before):
            choice.after(window, passes, seconds, sum(slot.known - known for slot, known in before) / len(slots))
            self._passes_per_turn = max(1, int(min(self._seconds * passes / seconds, MOST_PASSES)))
        return passes

    def tokens(self, slot: Slot) -> Tensor:
        """(known,) int64 on the host: what is known of an image; -1 stands for a step without a distribution."""
        return self._state.tokens[slot._place, : slot.known].to("cpu", copy=True)

    def passes(self, slot: Slot) -> int:
        """Passes that an image has taken so far."""
        return int(self._state.passes[slot._place])

    def _read_progress(self) -> None:
        images, length = len(self._slots), self.model.config.num_tokens
        known = [length if at < 0 else at for at in self._state.positions.tolist()]
        for slot in self.active:
            slot.known = min(known[slot._place :: images][: len(slot.sequences)])

    def _advance(self, passes: int, window: int) -> None:
        graph = self._graphs.get((len(self._slots), window))
        if graph is None:
            self.model.expect(len(self._state.ids) * window)
            self.model.sample_passes(self._state, self.cache, passes, window)
        else:
            for _ in range(passes):
                graph.replay()

    # ---- images and where they stand in the state ----

    def _state_of(self, size: int) -> SampleState:
        """The state for so many images, all of which rest when it is made."""
        if size not in self._states:
            device = self.model.device
            with torch.inference_mode(False):
                state = new_state(self.model, size, True, torch.zeros(2 * size, dtype=torch.int64, device=device))
                state.positions.fill_(-1)
            self._states[size] = state
            if device.type == "cuda":
                for window in self._windows:
                    self.model.expect(2 * size * window)
                    work = partial(self.model.sample_passes, state, self.cache, 1, window)
                    self._graphs[size, window] = capture(device, work)
                self._read_by_graphs = self.model.tensors()
        return self._states[size]

    def _free_place(self) -> int:
        if None not in self._slots:
            self._resize(self._sizes[self._sizes.index(len(self._slots)) + 1])
        return self._slots.index(None)

    def _fit(self) -> None:
        """The smallest state that holds the images: a graph also takes time for those that rest."""
        smallest = next(size for size in self._sizes if size >= len(self.active))
        if smallest < len(self._slots):
            self._resize(smallest)

    def _resize(self, size: int) -> None:
        slots, old, new = self.active, self._state, self._state_of(size)
        images = torch.tensor([slot._place for slot in slots], dtype=torch.int64, device=self.model.device)
        new.positions.fill_(-1)
        for name in OF_IMAGES:
            getattr(new, name)[: len(slots)] = getattr(old, name)[images]
        for name in OF_ROWS:
            for begin_new, begin_old in ((0, 0), (size, len(self._slots))):
                getattr(new, name)[begin_new : begin_new + len(slots)] = getattr(old, name)[images + begin_old]
        self._state, self._slots = new, [*slots, *[None] * (size - len(slots))]
        for place, slot in enumerate(slots):
            slot._place = place

    def _put(self, one: SampleState, place: int) -> None:
        """Write the state of a single image at a place of ours; without guidance its unconditional row rests."""
        images, rows = len(self._slots), len(one.positions)
        for name in OF_IMAGES:
            given = getattr(one, name)
            if given is not None:
                getattr(self._state, name)[place] = given[0]
        for name in OF_ROWS:  # a row that rests has ids and a sequence too, which nothing writes
            getattr(self._state, name)[place::images] = getattr(one, name)
        if rows == 1:
            self._state.positions[images + place] = -1


def plan_slots(model: StepModel, kv_dtype: torch.dtype | None = None, windows: Sequence[int] = (1,)) -> MemoryPlan:
    """`plan` for images with guidance in a `SlotLoop` with two sequences for each.

    Each of the two could be an image without guidance, so the largest state has four rows for them. On a CUDA device
    each size and window has a graph with activations of its own, and the smaller sizes together have up to twice as
    many rows as the largest.
    """
    of_one_batch = plan(model, kv_dtype=kv_dtype, window=windows[-1])
    rows = 3 * 4 * len(windows) if model.device.type == "cuda" else 2  # on a CPU rows that rest have none
    more = (rows - 2) * row_bytes(model.config)
    return dataclasses.replace(
        of_one_batch, bytes_per_image=of_one_batch.bytes_per_image + more, few_images=of_one_batch.few_images // 2
    )
