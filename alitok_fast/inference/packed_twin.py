"""A tokenizer's encoder or decoder with packed weights, int8 or bfloat16, for the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from alitok_fast.models.layers import TokenizerLayer
from alitok_fast.models.tokenizer import Decoder, Encoder
from alitok_fast.ops.bf16_linear import bf16_linear, pack_bf16
from alitok_fast.ops.int8_linear import int8_linear, pack_int8
from alitok_fast.ops.linear import FAST
from alitok_fast.ops.packed_linear import RowNorm
from alitok_fast.ops.prefix_attention import prefix_attention

Half = TypeVar("Half", Encoder, Decoder)
FORMATS: dict[torch.dtype, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    torch.int8: (pack_int8, int8_linear),
    torch.bfloat16: (pack_bf16, bf16_linear),
}


def has_twin(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of that dtype are packed there: int8 on any CPU, bfloat16 on those that multiply it."""
    return device.type == "cpu" and (dtype == torch.int8 or (dtype == torch.bfloat16 and FAST))


class PackedLinear(nn.Module):
    """A linear layer with packed weights, and what stands around it in a transformer (`ops.bf16_linear`)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        pack, self._multiply = FORMATS[dtype]
        self.outputs = linear.out_features
        self.register_buffer("weight", pack(linear.weight))
        self.register_buffer("bias", linear.bias.detach().float())

    def forward(
        self, x: Tensor, norm: nn.LayerNorm | None = None, gelu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """bfloat16, but for a sum with a residual, which is float32."""
        dtype = torch.bfloat16 if residual is None else torch.float32
        rows = None if norm is None else RowNorm(norm.weight, norm.bias, norm.eps)
        return self._multiply(x, self.weight, self.bias, self.outputs, dtype, norm=rows, gelu=gelu, residual=residual)


class PackedLayer(nn.Module):
    """A TokenizerLayer in four products and an attention; the residual stream is float32."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(layer, TokenizerLayer)
        self.num_heads = layer.attn.num_heads
        self.ln_1, self.ln_2 = (copy.deepcopy(norm).float() for norm in (layer.ln_1, layer.ln_2))
        self.in_proj, self.out_proj = (PackedLinear(m, dtype) for m in (layer.attn.in_proj, layer.attn.out_proj))
        self.c_fc, self.c_proj = (PackedLinear(m, dtype) for m in (layer.mlp.c_fc, layer.mlp.c_proj))

    def forward(self, x: Tensor, prefix_len: int) -> Tensor:
        qkv = self.in_proj(x, norm=self.ln_1).unflatten(-1, (3, self.num_heads, -1))
        x = self.out_proj(prefix_attention(qkv, prefix_len).flatten(-2), residual=x)
        return self.c_proj(self.c_fc(x, norm=self.ln_2, gelu=True), residual=x)


def packed_twin(half: Half, dtype: torch.dtype) -> Half:
    """A copy whose transformer multiplies in int8 or bfloat16 and attends in bfloat16, around a float32 residual."""
    rest = copy.copy(half)
    rest._modules = {**half._modules, "transformer": nn.ModuleList()}  # the layers' own weights need no copy
    twin = copy.deepcopy(rest).float()
    twin.transformer.extend(PackedLayer(layer, dtype) for layer in half.transformer)
    return twin
