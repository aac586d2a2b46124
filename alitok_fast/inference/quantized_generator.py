"""A generator with 8-bit weights in its blocks, for sampling on a GPU. (On the CPU that is `PackedGenerator`.)"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from alitok_fast.inference.cuda_graph import storage
from alitok_fast.inference.origin import Origin
from alitok_fast.models.generator import Generator, condition_ids, read_prompt, sample_passes
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.ops.decode import SampleState
from alitok_fast.ops.quantized_linear import quantize_weight, quantized_linear


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are rounded to int8 or float8_e4m3fn, with one scale per output and 64 inputs."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight, scale = quantize_weight(linear.weight, dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.scale, self.bias)


class QuantizedGenerator:
    """A generator that steps with block weights in 8 bits; its embeddings, norms and head are those of `gen`.

    It holds a copy of the blocks' weights, so later changes of them in `gen` do not reach it, and `gen` may be dropped
    to free its own.

    Args:
        gen: the generator, in evaluation mode for sampling; its dtype is that of activations, biases and cache.
        weight_dtype: torch.int8 or torch.float8_e4m3fn.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, gen: Generator, weight_dtype: torch.dtype) -> None:
        if weight_dtype not in (torch.int8, torch.float8_e4m3fn):
            name = str(weight_dtype).removeprefix("torch.")
            raise ValueError(f"weight_dtype: expected int8 or float8_e4m3fn, got {name}")
        self.config = gen.config
        self.device = gen.device
        self.dtype = gen.dtype
        self.cache_dtype = gen.cache_dtype
        self.weight_dtype = weight_dtype
        self._origin = Origin(gen)
        self.module: Any = _shallow_copy(gen)
        self.module.blocks = _quantized(gen.blocks, weight_dtype)

    @property
    def training(self) -> bool:
        """Whether the generator that this is a copy of is in training mode; False where it is gone."""
        return self._origin.training

    def new_cache(self, slots: int, dtype: torch.dtype | None = None, columns: int = 1) -> KVCache:
        """As `Generator.new_cache`."""
        return KVCache(self.config, slots, self.device, dtype or self.cache_dtype, columns)

    def step(self, ids: Tensor, cache: KVCache, positions: Tensor, slots: Tensor | None = None) -> Tensor:
        """As `Generator.step`."""
        return self.module.step(ids, cache, positions, slots)

    def condition_ids(self, labels: Tensor | None, batch_size: int) -> Tensor:
        """As `Generator.condition_ids`."""
        return condition_ids(self.config, labels, batch_size, self.device)

    def sample_passes(self, state: SampleState, cache: KVCache, passes: int, window: int = 1) -> None:
        """As `Generator.sample_passes`."""
        sample_passes(self, state, cache, passes, window)

    def read_prompt(self, state: SampleState, cache: KVCache, length: int) -> int:
        """As `Generator.read_prompt`."""
        return read_prompt(self, state, cache, length)

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads besides the cache."""
        return storage(self.module)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights by name, those in 8 bits with their scales."""
        return self.module.state_dict()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the blocks' weights, scales and biases included."""
        return sum(tensor.nbytes for tensor in self.module.blocks.state_dict().values())


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Another module around the same parameters, whose submodules can be exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _quantized(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its linear layers quantised; everything else is shared."""
    if isinstance(module, nn.Linear):
        return QuantizedLinear(module, dtype)
    twin = _shallow_copy(module)
    for name, child in module.named_children():
        twin._modules[name] = _quantized(child, dtype)
    return twin
