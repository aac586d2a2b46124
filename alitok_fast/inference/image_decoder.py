"""Tokens to images: the second half of sampling."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from alitok_fast import _library
from alitok_fast.inference.cuda_graph import Turn, capture, storage
from alitok_fast.inference.origin import Origin
from alitok_fast.inference.packed_twin import has_twin, packed_twin
from alitok_fast.inference.parts import images_at_a_time, keep_freed_memory
from alitok_fast.models.checks import check_plain, check_range, check_tensor
from alitok_fast.models.tokenizer import Tokenizer

GRAPHS = 8  # batch sizes whose CUDA graphs are kept: 1, 2, 4, ... 64, and one besides


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it faster than float32, else float32.

    That is CPUs with AVX-512 BF16 or AMX, and GPUs from compute capability 8.0.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if _library.detected_cpu_isa() == "avx512" else torch.float32


class ImageDecoder:
    """`Tokenizer.decode` in its own dtype; on a CUDA device, one CUDA graph per batch size.

    Where the dtype differs from the tokenizer's, it holds a copy of the decoder, made anew when the tokenizer's
    weights have changed since. Calls from several threads take turns, whatever streams they use. It can be pickled and
    copied: graphs are made anew.

    Args:
        tokenizer: in evaluation mode.
        dtype: torch.float32, torch.bfloat16 or torch.float16 for the decoder's weights and activations; on the CPU also
            torch.int8 for the products of its transformer (docs/precision.md), which was the fastest where it was
            measured: with VNNI and without AMX. None takes bfloat16 for a float32 tokenizer where that is faster
            (`fast_dtype`), else the tokenizer's own.

    Raises:
        ValueError: for another dtype, or int8 on another device.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: torch.dtype | None = None) -> None:
        if dtype is None:
            dtype = fast_dtype(tokenizer.device) if tokenizer.dtype == torch.float32 else tokenizer.dtype
        allowed = ["float32", "bfloat16", "float16", *(["int8"] if tokenizer.device.type == "cpu" else [])]
        name = str(dtype).removeprefix("torch.")
        if name not in allowed:
            raise ValueError(f"decode_dtype: expected {', '.join(allowed)} on {tokenizer.device.type}, got {name}")
        self.config, self.device, self.dtype = tokenizer.config, tokenizer.device, dtype
        self._packed = dtype != tokenizer.dtype and has_twin(dtype, self.device)
        self._activations = torch.float32 if self._packed else dtype
        self._take(tokenizer)
        self._begin()

    def _take(self, tokenizer: Tokenizer) -> None:
        check_plain(tokenizer)
        self._embedding, self._decoder = tokenizer.quantize.embedding, tokenizer.decoder
        self._origin = Origin(tokenizer if self.dtype != tokenizer.dtype else None)
        if self.dtype != tokenizer.dtype:
            with torch.inference_mode(False), torch.no_grad():
                self._embedding = copy.deepcopy(self._embedding)
                if self._packed:
                    self._decoder = packed_twin(self._decoder, self.dtype)
                else:
                    self._decoder = copy.deepcopy(self._decoder).to(self.dtype)

    def _begin(self) -> None:
        self._graphs: OrderedDict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = OrderedDict()
        self._pool: tuple[int, int] | None = None  # graphs take turns, and share their memory
        self._read_by_graphs: list[Tensor] = []
        self._turn = Turn(self.device)  # a graph has one place for its tokens
        self._turn.outlives(self)
        keep_freed_memory(self.device)

    def __getstate__(self) -> dict[str, Any]:
        made = ("_graphs", "_pool", "_read_by_graphs", "_turn")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) int64 -> images (B, 3, H, W) float32 in [0, 1]. Raises as `Tokenizer.decode`."""
        check_tensor("tokens", tokens, torch.int64, ("B", self.config.num_tokens), self.device)
        check_range("tokens", tokens, 0, self.config.codebook_size)
        self.refresh()
        return self.decode_again(tokens)

    @torch.no_grad()
    def decode_again(self, tokens: Tensor) -> Tensor:
        """A call with tokens that need no check and the weights of the last one: for who decodes all the time."""
        parts = [self._images(part) for part in tokens.split(images_at_a_time(self.device))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def refresh(self) -> None:
        """Copy the decoder anew where the tokenizer's weights have changed since."""
        tokenizer: Any = self._origin.module
        if not self._origin.changed():
            return
        with self._turn:
            if self._origin.changed():  # no other thread was first
                self._turn.wait()  # another stream may not be done with what goes
                self._graphs.clear()
                self._pool, self._read_by_graphs = None, []
                self._take(tokenizer)

    def _images(self, tokens: Tensor) -> Tensor:
        if self.device.type != "cuda" or not len(tokens):
            return self._decode(tokens)
        with self._turn:
            graph, given, images = self._graph(len(tokens))
            given.copy_(tokens)
            graph.replay()
            return images.clone()

    def _decode(self, tokens: Tensor) -> Tensor:
        """Nothing in here waits for the device."""
        return self._decoder(self._embedding(tokens).to(self._activations))[0].float()

    def _graph(self, batch_size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """The graph for this batch size, the tokens that it reads and the images that it writes."""
        if batch_size not in self._graphs:
            while len(self._graphs) >= GRAPHS:
                self._turn.wait()  # another stream may not be done with it
                self._graphs.popitem(last=False)
            size = self.config.image_size
            with torch.inference_mode(False):  # else they could be written in such a mode only
                tokens = torch.zeros(batch_size, self.config.num_tokens, dtype=torch.int64, device=self.device)
                images = torch.empty(batch_size, 3, size, size, device=self.device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._read_by_graphs = [*storage(self._embedding), *storage(self._decoder)]
            graph = capture(self.device, lambda: images.copy_(self._decode(tokens)), self._pool)
            self._graphs[batch_size] = graph, tokens, images
        self._graphs.move_to_end(batch_size)
        return self._graphs[batch_size]
