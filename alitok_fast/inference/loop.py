"""The cached loop that draws one batch of token sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from alitok_fast._library import native_enabled
from alitok_fast.config import GeneratorConfig
from alitok_fast.inference.cuda_graph import Turn, capture, storage
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.models.generator import Generator
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.ops.decode import SampleState, sample_next


class StepModel(Protocol):
    """What the loop needs of a model: `models.Generator`, `QuantizedGenerator` and `PackedGenerator` have it.

    On a CUDA device also `module`, an nn.Module that holds all that a step reads.
    """

    config: GeneratorConfig
    device: torch.device
    training: bool
    cache_dtype: torch.dtype

    def new_cache(self, rows: int, dtype: torch.dtype | None = None) -> KVCache: ...
    def step(self, ids: Tensor, cache: KVCache) -> Tensor: ...
    def condition_ids(self, labels: Tensor | None, batch_size: int) -> Tensor: ...


def for_steps(gen: StepModel) -> StepModel:
    """What to step with: a generator on the CPU packed into a `PackedGenerator`, anything else as it is."""
    native = isinstance(gen, Generator) and gen.device.type == "cpu" and native_enabled()
    return PackedGenerator(gen) if native else gen


class SamplingLoop:
    """One batch being drawn. All that a step reads or writes are tensors that stay where they are.

    On a CUDA device the first run captures a step as a CUDA graph and replays it: no launch overhead, nothing read
    back. A loop can be run again with other labels, seeds and schedules.

    A generator on the CPU is packed into a `PackedGenerator`, which samples many tokens in one native call; inside `use_reference` it runs as it is.

    Runs from several threads take turns, whatever streams they use. `turn` is given by an owner of several loops: it
    makes them inside a turn, and calls `draw` inside one.
    """

    STEPS_PER_CALL = 16  # Ctrl-C waits for the end of a native call; starting one costs far less than a step

    def __init__(
        self,
        model: StepModel,
        batch_size: int,
        guided: bool,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        kv_dtype: torch.dtype | None = None,
        turn: Turn | None = None,
    ) -> None:
        self.model, self.batch_size, self.guided = for_steps(model), batch_size, guided
        rows, steps, device = batch_size * (2 if guided else 1), model.config.num_tokens, model.device
        try:
            self.cache = self.model.new_cache(rows, kv_dtype)
        except RuntimeError as error:
            size = rows * KVCache.bytes_per_row(model.config, kv_dtype or self.model.cache_dtype)
            raise MemoryError(
                f"labels: expected a batch that fits in memory, got {batch_size} images, {size / 2**30:.1f} GiB; "
                "alitok_fast.plan(gen) says how many fit"
            ) from error

        @torch.inference_mode(False)  # else they could be written in such a mode only
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.drawing = SampleState(
            ids=zeros(rows),
            tokens=zeros(batch_size, steps),
            prompt_length=zeros(),
            schedule=zeros(steps, dtype=torch.float32) if guided else None,
            seed=zeros(),
            image_ids=zeros(batch_size),
            temperature=float(temperature),
            top_k=top_k,
            top_p=top_p,
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._read_by_graph: list[Tensor] = []
        self.turn = Turn(device) if turn is None else turn
        self.turn.outlives(self)

    def run(
        self,
        labels: Tensor,
        schedule: Tensor | None,
        seed: int,
        image_ids: Tensor,
        prompt_tokens: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """tokens (B, N); arguments as in `sampling.sample`, checked there. Rows without a distribution hold -1."""
        with self.turn:
            return self.draw(labels, schedule, seed, image_ids, prompt_tokens, on_step)

    def draw(
        self,
        labels: Tensor,
        schedule: Tensor | None,
        seed: int,
        image_ids: Tensor,
        prompt_tokens: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """As `run`, for whoever has the turn."""
        if self.model.device.type == "cuda" and self._graph is None:
            self._start(labels, schedule, seed, image_ids, prompt_tokens)
            self._graph = capture(self.model.device, self.step)
            self._read_by_graph = storage(self.model.module)
        self._start(labels, schedule, seed, image_ids, prompt_tokens)
        tokens = self.drawing.tokens
        length = tokens.shape[1]
        stride = 1 if on_step is not None else self.STEPS_PER_CALL
        for begin in range(0, length, stride):
            end = min(begin + stride, length)
            self._advance(end - begin)
            if on_step is not None:
                on_step(begin, tokens[:, :end].clone())
        return tokens.clone()

    def step(self) -> None:
        """Feed the current ids, draw the next token of each image and make it current."""
        position = self.cache.position.clone()
        sample_next(self.drawing, self.model.step(self.drawing.ids, self.cache), position)

    def _advance(self, steps: int) -> None:
        if isinstance(self.model, PackedGenerator):
            return self.model.draw(self.drawing, self.cache, steps)
        for _ in range(steps):
            self.step() if self._graph is None else self._graph.replay()

    def _start(self, labels, schedule, seed, image_ids, prompt_tokens) -> None:
        drawing, condition = self.drawing, self.model.condition_ids(labels, self.batch_size)
        if self.guided:
            condition = torch.cat([condition, self.model.condition_ids(None, self.batch_size)])
            drawing.schedule.copy_(schedule)
        drawing.ids.copy_(condition)
        self.cache.position.zero_()
        drawing.seed.fill_(seed)
        drawing.image_ids.copy_(image_ids)
        drawing.prompt_length.fill_(0 if prompt_tokens is None else prompt_tokens.shape[1])
        if prompt_tokens is not None:
            drawing.tokens[:, : prompt_tokens.shape[1]] = prompt_tokens
