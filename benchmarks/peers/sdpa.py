"""Our models as plain PyTorch would have them: scaled_dot_product_attention, no operator of ours in their layers."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alitok_fast.models import Generator, Tokenizer
from alitok_fast.models.layers import NORM_EPS, GeneratorBlock, SelfAttention
from alitok_fast.ops.prefix_attention import rotate
from alitok_fast.training.layers import layers_of


class PlainAttention(nn.Module):
    """The tokenizer's attention, on the weights of `attention`."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.num_heads, self.in_proj, self.out_proj = attention.num_heads, attention.in_proj, attention.out_proj

    def forward(self, x: Tensor, prefix_len: int) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=prefix_len == 0)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class PlainBlock(nn.Module):
    """The generator's block, on the weights of `block`."""

    def __init__(self, block: GeneratorBlock) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.dropout = block.dropout

    def forward(self, x: Tensor, delta: Tensor | None, rope: Tensor) -> tuple[Tensor, Tensor]:
        if delta is not None:
            x = x + F.dropout(delta.float(), self.dropout, self.training)
        x = x + F.dropout(self._attend(_normed(x, self.norm1.weight), rope).float(), self.dropout, self.training)
        return x, self.mlp(_normed(x, self.norm2.weight))

    def _attend(self, x: Tensor, rope: Tensor) -> Tensor:
        attn = self.attn
        q, k, v = attn.project(x).transpose(1, 3).unbind(2)
        q, k = rotate(_normed(q, attn.q_norm.weight), rope), rotate(_normed(k, attn.k_norm.weight), rope)
        dropout = attn.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, dropout_p=dropout)
        return attn.proj(out.transpose(1, 2).flatten(-2))


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return (F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS) * weight).to(dtype)


def plain(model: Generator | Tokenizer, compiled: bool) -> Generator | Tokenizer:
    """A model on the parameters of `model`, whose layers are plain, and compiled one by one where asked for."""
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if isinstance(model, Generator):
        model.blocks = nn.ModuleList(PlainBlock(block) for block in model.blocks)
    else:
        for layer in layers_of(model):
            layer.attn = PlainAttention(layer.attn)
    if compiled:
        for layer in layers_of(model):
            layer.compile()
    return model
