"""This library, in each of its precisions."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor

from alitok_fast.inference.cuda_graph import capture
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.inference.sampler import Sampler
from alitok_fast.models import Generator
from alitok_fast.ops.decode import sample_next
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
        if gen.device.type == "cpu":
            self.model = PackedGenerator(gen, weights)
        else:
            self.model = _on_gpu(gen, weights)
        self.sampler = Sampler(self.model, kv_dtype)
        self.loop = self.sampler.loop(batch, guided=True)
        self.kv_dtype = kv_dtype
        self.error = {torch.float32: 1e-4}.get(weights, 5e-2) if kv_dtype is None else 0.1

    def logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        cache = self.model.new_cache(len(labels), self.kv_dtype)
        return torch.stack([self.model.step(ids, cache) for ids in conditions(self.gen, labels, tokens)], 1)

    def generate(self, labels: Tensor) -> Tensor:
        return self.sampler(labels)

    @property
    def kv_bytes(self) -> int:
        """Of one number in the cache."""
        return self.loop.cache.keys.element_size()

    @property
    def weight_bytes(self) -> int:
        """What each step reads of the weights."""
        if isinstance(self.model, PackedGenerator):
            return self.model.packed.step_bytes
        unread = self.gen.embeddings.weight
        tensors = self.model.state_dict().values()
        return sum(tensor.nbytes for tensor in tensors if tensor.shape != unread.shape)

    def draw_seconds(self) -> float:
        """Of all draws of one batch, timed by themselves on normal logits: inside a step they are not told apart."""
        drawing, device = self.loop.drawing, self.model.device
        codes, steps = self.model.config.codebook_size, self.model.config.num_tokens
        logits = torch.randn(len(drawing.ids), codes, device=device)
        position = torch.full((), steps // 2, dtype=torch.int64, device=device)

        def draw() -> None:
            sample_next(drawing, logits, position)

        if device.type == "cuda":
            draw = capture(device, draw).replay
        draw()
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            draw()
        synchronize(device)
        return time.perf_counter() - begin


def _on_gpu(gen: Generator, weights: torch.dtype) -> Generator | QuantizedGenerator:
    if weights == torch.float32:
        return gen
    rounded = copy.deepcopy(gen).to(torch.bfloat16)
    return rounded if weights == torch.bfloat16 else QuantizedGenerator(rounded, weights)
