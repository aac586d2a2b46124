"""The cached loop that samples one batch of token sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from alitok_fast.inference.cuda_graph import Turn, capture
from alitok_fast.inference.step_model import StepModel
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.ops.decode import SampleState

STEPS_PER_CALL = 16  # Ctrl-C waits for the end of a native call; starting one costs far less than a step


class SamplingLoop:
    """One batch while it is sampled. Every tensor that a step reads or writes stays where it is.

    On a CUDA device the first run captures a step as a CUDA graph and replays it, so that there is no launch overhead
    and nothing is read back. A loop can be run again with other labels, seeds and schedules.

    Runs from several threads take turns, whatever streams they use. `turn` is given by an owner of several loops: it
    makes them inside a turn, and calls `run` inside one, with `in_turn`.
    """

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
        self.model, self.batch_size, self.guided = model, batch_size, guided
        rows, steps, device = batch_size * (2 if guided else 1), model.config.num_tokens, model.device
        try:
            self.cache = self.model.new_cache(rows, kv_dtype)
        except RuntimeError as error:
            size = rows * KVCache.bytes_per_row(model.config, kv_dtype or self.model.cache_dtype)
            raise MemoryError(
                f"labels: expected a batch whose cache fits in memory, got {batch_size} images, "
                f"{size / 2**30:.1f} GiB; alitok_fast.plan(gen) says how many fit"
            ) from error

        @torch.inference_mode(False)  # else they could be written in such a mode only
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.state = SampleState(
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
        in_turn: bool = False,
    ) -> Tensor:
        """tokens (B, N); arguments as in `sampler.sample`, checked there. Rows without a distribution hold -1.

        `in_turn`: the caller has the turn already.
        """
        with contextlib.nullcontext() if in_turn else self.turn:
            if self.model.device.type == "cuda" and self._graph is None:
                self.start(labels, schedule, seed, image_ids, prompt_tokens)
                self._graph = capture(self.model.device, self.step)
                self._read_by_graph = self.model.tensors()
            self.start(labels, schedule, seed, image_ids, prompt_tokens)
            tokens = self.state.tokens
            length = tokens.shape[1]
            stride = 1 if on_step is not None else STEPS_PER_CALL
            for begin in range(0, length, stride):
                end = min(begin + stride, length)
                self.advance(end - begin)
                if on_step is not None:
                    on_step(begin, tokens[:, :end].clone())
            return tokens.clone()

    def start(
        self,
        labels: Tensor,
        schedule: Tensor | None,
        seed: int,
        image_ids: Tensor,
        prompt_tokens: Tensor | None = None,
    ) -> None:
        """Write the beginnings of these images where the next step reads them."""
        state, condition = self.state, self.model.condition_ids(labels, self.batch_size)
        if state.schedule is not None and schedule is not None:
            condition = torch.cat([condition, self.model.condition_ids(None, self.batch_size)])
            state.schedule.copy_(schedule)
        state.ids.copy_(condition)
        self.cache.position.zero_()
        state.seed.fill_(seed)
        state.image_ids.copy_(image_ids)
        state.prompt_length.fill_(0 if prompt_tokens is None else prompt_tokens.shape[1])
        if prompt_tokens is not None:
            state.tokens[:, : prompt_tokens.shape[1]] = prompt_tokens

    def advance(self, steps: int) -> None:
        """Sample the next `steps` tokens of each image: replays of the graph, where one was captured."""
        if self._graph is None:
            return self.model.sample_steps(self.state, self.cache, steps)
        for _ in range(steps):
            self._graph.replay()

    def step(self) -> None:
        """Feed the current ids, sample the next token of each image and make it current; without the graph."""
        self.model.sample_steps(self.state, self.cache, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, which is nearly all that a loop holds."""
        return self.cache.keys.nbytes + self.cache.values.nbytes
