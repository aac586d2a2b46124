"""A generator with 8-bit weights in its blocks, for sampling on a GPU. (On the CPU that is `PackedGenerator`.)"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alitok_fast._library import native_enabled
from alitok_fast.inference.cuda_graph import storage
from alitok_fast.inference.origin import Origin
from alitok_fast.models.generator import Generator, condition_ids, read_prompt, sample_passes
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.ops.decode import SampleState
from alitok_fast.ops.fused_linear import INPUTS_MULTIPLE, NORMED_INPUTS, fused_rows
from alitok_fast.ops.quantized_linear import MOST_ROWS, quantize_weight, quantized_linear, widen_weight

_widening = threading.Lock()  # whose turn it is to write the weights of a generator out


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

    def widened(self, dtype: torch.dtype) -> nn.Linear:
        """A layer with these weights in `dtype`, as `quantized_linear` rounds them for many rows."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], self.bias is not None, device="meta")
        linear.weight = nn.Parameter(widen_weight(self.weight, self.scale, dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear


class QuantizedGenerator:
    """A generator that steps with block weights in 8 bits; its embeddings, norms and head are those of `gen`.

    It holds a copy of the blocks' weights, so later changes of them in `gen` do not reach it, and `gen` may be dropped
    to free its own.

    Steps of up to `most_inputs` inputs read the 8-bit weights. For more, a product takes far longer than reading its
    weights, and each would be written out in the dtype of activations first. Who will do many such steps says so
    (`expect`, as the sampling loop does): then all are written out once, and kept beside the 8-bit ones, which takes
    `wide_bytes` more. The results are the same to the bit.

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
        self.module.blocks = _with_linears(gen.blocks, nn.Linear, lambda layer: QuantizedLinear(layer, weight_dtype))
        self._wide: Any = None  # the same with all weights written out

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_wide": None}  # a copy makes its own when it needs it

    @property
    def training(self) -> bool:
        """Whether the generator that this is a copy of is in training mode; False where it is gone."""
        return self._origin.training

    def new_cache(self, slots: int, dtype: torch.dtype | None = None, columns: int = 1) -> KVCache:
        """As `Generator.new_cache`."""
        return KVCache(self.config, slots, self.device, dtype or self.cache_dtype, columns)

    def step(self, ids: Tensor, cache: KVCache, positions: Tensor, slots: Tensor | None = None) -> Tensor:
        """As `Generator.step`."""
        wide = self._wide
        many = wide is not None and ids.numel() > self.most_inputs and native_enabled()
        exact = not torch.is_autocast_enabled(self.device.type)  # products with 8-bit weights know no autocast
        return (wide if many and exact else self.module).step(ids, cache, positions, slots)

    @property
    def most_inputs(self) -> int:
        """Inputs (rows times window) of a step up to which the 8-bit weights are used as they are."""
        widths = self.config.width, self.config.hidden
        fused = (
            self.device.type == "cuda"
            and self.dtype == torch.bfloat16
            and self.config.width <= NORMED_INPUTS
            and not any(width % INPUTS_MULTIPLE for width in widths)
        )
        return fused_rows(self.weight_dtype, self.device) if fused else MOST_ROWS

    @property
    def wide_bytes(self) -> int:
        """Bytes that the weights will take when they are written out; 0 where they are already."""
        layers = [layer for layer in self.module.blocks.modules() if isinstance(layer, QuantizedLinear)]
        return 0 if self._wide is not None else self.dtype.itemsize * sum(layer.weight.numel() for layer in layers)

    def expect(self, inputs: int) -> None:
        """As `StepModel.expect`: beyond `most_inputs`, write the weights out, unless they are."""
        if inputs <= self.most_inputs or not native_enabled():
            return
        with _widening, torch.inference_mode(False), torch.no_grad():
            if self._wide is not None:
                return
            wide = _shallow_copy(self.module)
            wide.blocks = _with_linears(self.module.blocks, QuantizedLinear, lambda layer: layer.widened(self.dtype))
            if self.device.type == "cuda":  # other streams, whose loops share this generator, know nothing of this one
                torch.cuda.current_stream(self.device).synchronize()
            self._wide = wide

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
        return storage(self.module) + ([] if self._wide is None else storage(self._wide.blocks))

    def state_dict(self) -> dict[str, Tensor]:
        """All weights by name, those in 8 bits with their scales."""
        return self.module.state_dict()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the blocks' weights in 8 bits, scales and biases included."""
        return sum(tensor.nbytes for tensor in self.module.blocks.state_dict().values())


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Another module around the same parameters, whose submodules can be exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _with_linears(module: nn.Module, kind: type[nn.Module], made: Callable[[Any], nn.Module]) -> nn.Module:
    """The module with what `made` makes of its layers of a kind in their place; everything else is shared."""
    if isinstance(module, kind):
        return made(module)
    twin = _shallow_copy(module)
    for name, child in module.named_children():
        twin._modules[name] = _with_linears(child, kind, made)
    return twin
