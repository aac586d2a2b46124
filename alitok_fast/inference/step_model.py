"""Step models: the protocol that the sampling loop needs, and the one place that decides how a generator is packed."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from alitok_fast._library import native_enabled
from alitok_fast.config import GeneratorConfig
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.models.checks import check_plain
from alitok_fast.models.generator import Generator
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.ops.decode import SampleState


@runtime_checkable
class StepModel(Protocol):
    """A generator that appends to cached sequences: `Generator`, `PackedGenerator` or `QuantizedGenerator`.

    `weight_dtype` is the dtype of the blocks' matrices, and `cache_dtype` that of the key/value cache unless another
    is asked for. `training` is read at every call, because modules change it.
    """

    config: GeneratorConfig

    @property
    def device(self) -> torch.device: ...
    @property
    def training(self) -> bool: ...
    @property
    def weight_dtype(self) -> torch.dtype: ...
    @property
    def cache_dtype(self) -> torch.dtype: ...

    def condition_ids(self, labels: Tensor | None, batch_size: int) -> Tensor:
        """Embedding rows (B,) of the labels, or of "no condition"."""
        ...

    def new_cache(self, slots: int, dtype: torch.dtype | None = None, columns: int = 1) -> KVCache:
        """An empty cache for `slots` sequences."""
        ...

    def expect(self, inputs: int) -> None:
        """Many steps of so many inputs, rows times window, will follow: make what they read beside the weights."""
        ...

    def step(self, ids: Tensor, cache: KVCache, positions: Tensor, slots: Tensor | None = None) -> Tensor:
        """Append W ids to each row's sequence, ids (R, W), from its position on; the logits (R, W, K) after each."""
        ...

    def sample_passes(self, state: SampleState, cache: KVCache, passes: int, window: int = 1) -> None:
        """Up to `passes` times: feed the first `window` ids of each row, draw, and feed next what follows."""
        ...

    def read_prompt(self, state: SampleState, cache: KVCache, length: int) -> int:
        """Feed the first `length` >= 1 tokens of sequences that begin; how many are behind them then, all or none."""
        ...

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads besides the cache; a CUDA graph of steps keeps them alive."""
        ...


def prepare(
    generator: Generator | StepModel,
    weight_dtype: torch.dtype | None = None,
    activation_dtype: torch.dtype | None = None,
) -> StepModel:
    """The fastest step model for `generator` on its device, with matrices in `weight_dtype`.

    | generator | weight_dtype | result |
    |---|---|---|
    | on the CPU | None, float32, bfloat16, int8 | `PackedGenerator`, a copy; None is the generator's dtype |
    | on a GPU | None or the generator's dtype | the generator itself |
    | on a GPU | int8, float8_e4m3fn | `QuantizedGenerator`, a copy of the blocks' weights |
    | packed or quantized already | None or its own | itself |

    Inside `use_reference`, a generator on the CPU also steps by itself. Weights of float16 are packed as float32 on the
    CPU, which holds them exactly.

    `activation_dtype` is for int8 matrices on the CPU: torch.int8 multiplies them with activations of 8 bits instead of
    16, which is faster for many rows and less exact (docs/precision.md). None is 16 bits, or what is packed already.

    Raises:
        TypeError: `generator` cannot step.
        ValueError: a `weight_dtype` that is not in the table, an `activation_dtype` without such matrices, a generator
            whose forward pass is not that of its plain weights (adapters, hooks, parametrizations), which a copy of the
            weights would leave out.
    """
    if not isinstance(generator, Generator):
        if not isinstance(generator, StepModel):
            raise TypeError(f"gen: expected a generator, got {type(generator).__name__}")
        if weight_dtype not in (None, generator.weight_dtype):
            have, want = _name(generator.weight_dtype), _name(weight_dtype)
            raise ValueError(f"weight_dtype: expected the generator's {have}, got {want}")
        packed = generator.activation_dtype if isinstance(generator, PackedGenerator) else None
        if activation_dtype not in (None, packed):
            have, want = _name(packed), _name(activation_dtype)
            raise ValueError(f"activation_dtype: expected the generator's {have}, got {want}")
        return generator
    check_plain(generator)
    if generator.device.type == "cpu" and (native_enabled() or weight_dtype is not None):
        return PackedGenerator(generator, weight_dtype, activation_dtype)
    if activation_dtype is not None:
        got = _name(activation_dtype)
        raise ValueError(f"activation_dtype: expected None but for packed weights on a CPU, got {got}")
    if weight_dtype in (None, generator.dtype):
        return generator
    return QuantizedGenerator(generator, weight_dtype)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
