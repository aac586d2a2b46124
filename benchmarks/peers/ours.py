"""This library, in each of its precisions."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from alitok_fast.inference.cuda_graph import capture
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.sampler import Sampler, guidance_schedule
from alitok_fast.inference.step_model import prepare
from alitok_fast.models import Generator
from alitok_fast.ops.decode import sample_next
from alitok_fast.testing import step_logits
from ceilings import synchronize
from peers import conditions


class Ours:
    """`weights` float32, bfloat16, int8, or on a GPU float8_e4m3fn; there activations beside 8 bits are bfloat16.

    `window` is 1 unless it is asked for: how often guesses are right with random weights says nothing of trained ones.
    """

    def __init__(
        self,
        gen: Generator,
        images: ImageDecoder,
        batch: int,
        weights: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        activations: torch.dtype | None = None,
        window: int = 1,
    ) -> None:
        self.gen, self.decode, self.batch, self.window = gen, images, batch, window
        if gen.device.type != "cpu" and weights != torch.float32:
            gen = copy.deepcopy(gen).to(torch.bfloat16)
        self.model = prepare(gen, weights, activations)
        self.sampler = Sampler(self.model, kv_dtype=kv_dtype, window=window)
        self.loop = self.sampler.loop(batch, guided=True)
        self.kv_dtype = kv_dtype
        self.error = {torch.float32: 1e-4}.get(weights, 5e-2) if kv_dtype is None and activations is None else 0.1

    def logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        fed = torch.stack(list(conditions(self.gen, labels, tokens)), 1)
        return step_logits(self.model, fed, self.model.new_cache(len(labels), self.kv_dtype))

    def generate(self, labels: Tensor) -> Tensor:
        return self.sampler(labels)

    @property
    def kv_bytes(self) -> int:
        """Of one number in the cache."""
        return self.loop.cache.keys.element_size()

    @property
    def weight_bytes(self) -> int:
        """What each step reads of the weights."""
        unread = self.gen.embeddings.weight
        return sum(tensor.nbytes for tensor in self.model.tensors() if tensor.shape != unread.shape)

    def sampling_seconds(self) -> float:
        """Of choosing all tokens of one batch, timed by itself on normal logits: inside a step it is not told apart."""
        state, device = self.loop.state, self.model.device
        codes, steps = self.model.config.codebook_size, self.model.config.num_tokens
        logits = torch.randn(len(state.ids), 1, codes, device=device)

        def once() -> None:
            state.positions.fill_(steps // 2)
            sample_next(state, logits, 1)

        if device.type == "cuda":
            once = capture(device, once).replay
        once()
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            once()
        synchronize(device)
        return time.perf_counter() - begin


class AsOftenRight(Ours):
    """Samples as if guesses were right as often as a trained model's: a simulation, for weights that are random.

    The tokens are those of window 1, known beforehand. Each pass is fed so many of them as guesses that, on average, it
    settles `rate` tokens; its draws decide as ever, and the time is that of the real passes.
    """

    def __init__(self, *given: Any, rate: float, **options: Any) -> None:
        super().__init__(*given, **options)
        if not 1 <= rate <= self.window:
            raise ValueError(f"rate: expected 1..{self.window} tokens a pass, got {rate}")
        self.rate, self.known = rate, Sampler(self.model, window=1)(torch.arange(self.batch))

    def generate(self, labels: Tensor) -> Tensor:
        state, codes = self.loop.state, self.model.config.codebook_size
        params = SamplingParams().resolved(self.model.config)
        schedule = guidance_schedule(self.model.config.num_tokens, params.guidance_scale, params.guidance_power)
        self.loop.start(labels, schedule, params, torch.arange(self.batch))
        length, at, settled = self.known.shape[1], 0, 0.0
        while at < length:
            settled += self.rate
            right = min(int(settled) - at, self.window, length - at)  # tokens of this pass; one more guess is wrong
            guesses = self.known[:, at : at + right].repeat(len(state.ids) // self.batch, 1)
            if right < self.window:
                guesses[:, -1] = (guesses[:, -1] + 1) % codes
            state.ids[:, 1 : 1 + right] = guesses[:, : state.ids.shape[1] - 1]
            self.model.sample_passes(state, self.loop.cache, 1, self.window)
            at += right
            assert int(state.positions[0]) == (at if at < length else -1), "a pass settled another number of tokens"
        assert torch.equal(state.tokens, self.known)
        return state.tokens.clone()


def tokens_per_pass(gen: Generator, window: int, images: int = 64) -> float:
    """Of a trained generator at batch 1, classes in turn, without the first half of the images: guesses are learned."""
    sampler, rates = Sampler(gen, window=window), []
    for number in range(images):
        sampler([number % gen.config.num_classes], seed=number)
        rates.append(sampler.last_run.tokens_per_pass)
    return statistics.mean(rates[images // 2 :])
