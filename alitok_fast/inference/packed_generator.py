"""A generator packed for sampling on the CPU: its weights in one arena, many steps in one native call."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast.inference.origin import Origin
from alitok_fast.models.generator import Generator, condition_ids
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.models.layers import NORM_EPS
from alitok_fast.ops.decode import SampleState, decode, decode_tokens
from alitok_fast.ops.decode_weights import WEIGHT_DTYPES, LayerWeights, pack_weights


class PackedGenerator:
    """A generator that steps like `Generator.step`, from weights that are rounded and packed once.

    It holds a copy of the weights: later changes of `gen` do not reach it.

    Args:
        gen: the generator, on the CPU, of any floating dtype.
        weight_dtype: dtype of the matrices: torch.float32, torch.bfloat16, or torch.int8, which has one scale per
            output and 64 inputs. None takes the dtype of `gen`; for float16, which has no kernels here, float32.
        activation_dtype: what int8 matrices are multiplied with: torch.int16, or torch.int8, which is faster for many
            rows. None is int16.

    Raises:
        ValueError: another dtype, or a generator that is not on the CPU.
    """

    def __init__(
        self, gen: Generator, weight_dtype: torch.dtype | None = None, activation_dtype: torch.dtype | None = None
    ) -> None:
        if gen.device.type != "cpu":
            raise ValueError(f"gen: expected a generator on the CPU, got one on {gen.device}")
        self.config = gen.config
        self.device = gen.device
        self._origin = Origin(gen)
        if weight_dtype is None:
            weight_dtype = torch.float32 if gen.dtype == torch.float16 else gen.dtype
        if weight_dtype not in WEIGHT_DTYPES:
            name = str(weight_dtype).removeprefix("torch.")
            raise ValueError(f"weight_dtype: expected float32, bfloat16 or int8 on the CPU, got {name}")
        with torch.inference_mode(False), torch.no_grad():  # they may be kept longer than such a mode
            self.packed = pack_weights(
                [_layer_weights(block) for block in gen.blocks],
                norm=gen.norm.weight,
                head=gen.output.weight,
                head_bias=gen.output.bias,
                embeddings=gen.embeddings.weight,
                rope=gen.rope,
                dtype=weight_dtype,
                norm_eps=NORM_EPS,
                activation_dtype=activation_dtype,
            )

    @property
    def training(self) -> bool:
        """Whether the generator that this is a copy of is in training mode; False where it is gone."""
        return self._origin.training

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the blocks' matrices."""
        return self.packed.dtype

    @property
    def activation_dtype(self) -> torch.dtype:
        """What those matrices are multiplied with."""
        return self.packed.activation_dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of the key/value cache unless another is asked for: float32 for float32 weights, else bfloat16."""
        return torch.float32 if self.packed.dtype == torch.float32 else torch.bfloat16

    def new_cache(self, slots: int, dtype: torch.dtype | None = None, columns: int = 1) -> KVCache:
        """An empty cache for `slots` sequences; `dtype` is float32, bfloat16 or None for `cache_dtype`."""
        dtype = dtype or self.cache_dtype
        if dtype not in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"kv_dtype: expected float32 or bfloat16 on the CPU, got {name}")
        return KVCache(self.config, slots, self.device, dtype, columns)

    def expect(self, inputs: int) -> None:
        """As `Generator.expect`: nothing."""

    def step(self, ids: Tensor, cache: KVCache, positions: Tensor, slots: Tensor | None = None) -> Tensor:
        """As `Generator.step`; the logits are float32. Raises ValueError past the cache's end."""
        return decode(self.packed, ids, cache.keys, cache.values, positions, slots)

    def sample_passes(self, state: SampleState, cache: KVCache, passes: int, window: int = 1) -> None:
        """Up to `passes` times `step` and `sample_next`, in one native call; prompts in passes of their own."""
        decode_tokens(self.packed, state, cache.keys, cache.values, passes, window)

    def read_prompt(self, state: SampleState, cache: KVCache, length: int) -> int:
        """0: `sample_passes` reads it, without computing logits."""
        return 0

    def condition_ids(self, labels: Tensor | None, batch_size: int) -> Tensor:
        """As `Generator.condition_ids`."""
        return condition_ids(self.config, labels, batch_size, self.device)

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads besides the cache."""
        return [self.packed.arena, self.packed.vectors, self.packed.embeddings, self.packed.rope]


def _layer_weights(block) -> LayerWeights:
    attn, mlp = block.attn, block.mlp
    return LayerWeights(
        norm1=block.norm1.weight,
        qkv=attn.qkv.weight,
        qkv_bias=attn.qkv.bias,
        q_norm=attn.q_norm.weight,
        k_norm=attn.k_norm.weight,
        proj=attn.proj.weight,
        proj_bias=attn.proj.bias,
        norm2=block.norm2.weight,
        w1=mlp.w1.weight,
        w3=mlp.w3.weight,
        w2=mlp.w2.weight,
    )
