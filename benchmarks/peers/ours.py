"""This library, in each of its precisions."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor

from alitok_fast.inference.cuda_graph import capture
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.sampler import Sampler
from alitok_fast.inference.step_model import prepare
from alitok_fast.models import Generator
from alitok_fast.ops.decode import sample_next
from alitok_fast.testing import step_logits
from ceilings import synchronize
from peers import conditions


class Ours:
    """`weights` float32, bfloat16, int8, or on a GPU float8_e4m3fn; there activations beside 8 bits are bfloat16."""

    def __init__(
        self,
        gen: Generator,
        images: ImageDecoder,
        batch: int,
        weights: torch.dtype,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.gen, self.decode = gen, images
        if gen.device.type != "cpu" and weights != torch.float32:
            gen = copy.deepcopy(gen).to(torch.bfloat16)
        self.model = prepare(gen, weights)
        self.sampler = Sampler(self.model, kv_dtype=kv_dtype)
        self.loop = self.sampler.loop(batch, guided=True)
        self.kv_dtype = kv_dtype
        self.error = {torch.float32: 1e-4}.get(weights, 5e-2) if kv_dtype is None else 0.1

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
