"""Transformer layers of the tokenizer and of the generator.

Parameter names follow the released checkpoints, so that `state_dict()` is the
released format and loading needs no renaming.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from alitok_fast.models.kv_cache import KVCache
from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.cached_attention import cached_attention
from alitok_fast.ops.fused_linear import LinearWeights, embed_norm_linear, linear_add, norm_linear
from alitok_fast.ops.linear import mixed_linear
from alitok_fast.ops.prefix_attention import prefix_attention
from alitok_fast.ops.swiglu import swiglu

NORM_EPS = 1e-5

# Models are made in float32 whatever torch's default dtype is; `.to(dtype)` is how another is chosen.
LayerNorm = partial(nn.LayerNorm, eps=NORM_EPS, dtype=torch.float32)
Embedding = partial(nn.Embedding, dtype=torch.float32)
Conv2d = partial(nn.Conv2d, dtype=torch.float32)


class Linear(nn.Linear):
    """nn.Linear, whose products in bfloat16 on a CPU are this library's."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return mixed_linear(x, self.weight, self.bias)


def new_parameter(*shape: int) -> nn.Parameter:
    """A parameter without values yet."""
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))


class NoInitialisingOnMeta(TorchFunctionMode):
    """Inside, the initialisers that layers run on themselves leave out tensors on "meta", which have no values.

    Drawing such values imports torch._dynamo and sympy, a second of every start.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextlib.contextmanager
def making(device: torch.device | str | None) -> Iterator[None]:
    """How models are made: on `device`, None for torch's default one, and without values on "meta"."""
    with NoInitialisingOnMeta(), contextlib.nullcontext() if device is None else torch.device(device):
        yield


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, stored as one and applied to channels-last tensors (..., in) as a matrix product."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class SelfAttention(nn.Module):
    """Multi-head attention of the tokenizer: fused qkv with bias, no rotary embedding, no dropout."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = Linear(width, 3 * width)
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, prefix_len: int) -> Tensor:
        qkv = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1))
        return self.out_proj(prefix_attention(qkv, prefix_len).flatten(-2))


class Mlp(nn.Module):
    """Linear, exact GELU, linear; four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class TokenizerLayer(nn.Module):
    """Pre-LayerNorm transformer layer of the tokenizer's encoder and decoders."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = SelfAttention(width, num_heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, prefix_len: int) -> Tensor:
        x = x + self.attn(self.ln_1(x), prefix_len)
        return x + self.mlp(self.ln_2(x))


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast to the dtype of the weight, then times the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(self.weight.dtype) * self.weight


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden, bias=False)
        self.w3 = Linear(width, hidden, bias=False)
        self.w2 = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


def dropout_seed(x: Tensor, dropout: float) -> Tensor | None:
    """A fresh key per call from torch's generator: reproducible after torch.manual_seed, restored on resume."""
    return torch.randint(2**62, (), dtype=torch.int64, device=x.device) if dropout else None


class GeneratorAttention(nn.Module):
    """Causal attention with RMSNorm on q and k, then rotary embedding."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // num_heads)
        self.k_norm = RMSNorm(width // num_heads)
        self.proj = Linear(width, width)

    def project(self, x: Tensor) -> Tensor:
        """(..., width) to the packed (..., 3, heads, head_dim) that the attention operators read."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1))

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        out = prefix_attention(
            self.project(x),
            0,
            q_norm_weight=self.q_norm.weight,
            k_norm_weight=self.k_norm.weight,
            norm_eps=NORM_EPS,
            rope=rope,
            dropout=dropout,
            seed=dropout_seed(x, dropout),
        )
        return self.proj(out.flatten(-2))

    def step(
        self, packed: Tensor, rope: Tensor, cache: KVCache, layer: int, positions: Tensor, slots: Tensor | None
    ) -> Tensor:
        """Attention of W new positions of each row, given queries, keys and values (R * W, 3 * width), before `proj`;
        its layer's part of the cache is appended to."""
        rows = len(positions)
        attended = cached_attention(
            packed.view(rows, -1, 3, self.num_heads, packed.shape[-1] // (3 * self.num_heads)),
            cache.keys[layer],
            cache.values[layer],
            positions,
            slots=slots,
            q_norm_weight=self.q_norm.weight,
            k_norm_weight=self.k_norm.weight,
            norm_eps=NORM_EPS,
            rope=rope,
            arrivals=cache.arrivals_of(len(packed)),
        )
        return attended.view(len(packed), -1)


class GeneratorBlock(nn.Module):
    """x + attn(rms(x)), then x + mlp(rms(x)). The residual stream x is float32 whatever the dtype of the weights."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = GeneratorAttention(width, num_heads, dropout)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)
        self.dropout = dropout

    def forward(self, x: Tensor, delta: Tensor | None, rope: Tensor) -> tuple[Tensor, Tensor]:
        """The residual, and what this block's MLP adds to it.

        The addition, with its dropout, is left to the norm that follows, with which it is one kernel; `delta` comes
        from the block before.
        """
        x, normed = self._add_norm(x, delta, self.norm1)
        delta = self.attn(normed, rope)
        x, normed = self._add_norm(x, delta, self.norm2)
        return x, self.mlp(normed)

    def _add_norm(self, x: Tensor, delta: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        dropout = self.dropout if self.training and delta is not None else 0.0
        return add_rms_norm(x, delta, norm.weight, NORM_EPS, dropout, dropout_seed(x, dropout))

    def embed(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of an embedding, ids (R * W,), and `project` of them."""
        return embed_norm_linear(ids, table, self.norm1.weight, NORM_EPS, weights_of(self.attn.qkv))

    def project(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual (R * W, width) with `delta` added, and queries, keys and values of its positions."""
        return norm_linear(x, delta, self.norm1.weight, NORM_EPS, weights_of(self.attn.qkv))

    def step(
        self,
        x: Tensor,
        packed: Tensor,
        rope: Tensor,
        cache: KVCache,
        layer: int,
        positions: Tensor,
        slots: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What `forward` does behind `project`, for W new positions of each row. May write to `x`."""
        attn, mlp = self.attn, self.mlp
        attended = attn.step(packed, rope, cache, layer, positions, slots)
        x, delta = linear_add(x, attended, weights_of(attn.proj))
        gate = weights_of(mlp.w1)
        x, gated = norm_linear(x, delta, self.norm2.weight, NORM_EPS, weights_of(mlp.w3), gate)
        return linear_add(x, gated, weights_of(mlp.w2))


def weights_of(layer: Any) -> LinearWeights:
    """Of a linear layer, or of one with 8-bit weights. Raises ValueError for one that is more than its weights."""
    scale = getattr(layer, "scale", None)
    if (scale is None and type(layer) not in (Linear, nn.Linear)) or layer._forward_hooks or layer._forward_pre_hooks:
        raise ValueError(
            f"gen: expected plain linear layers, whose weights a step reads, got a {type(layer).__name__} or hooks; "
            "merge or remove adapters"
        )
    return LinearWeights(layer.weight, scale, layer.bias)
