"""Launches of the kernels that matter most, at the shapes of B, for Nsight Compute to look at (tools.py)."""

from __future__ import annotations

import torch

from alitok_fast.config import GENERATORS
from alitok_fast.ops.cached_attention import cached_attention
from alitok_fast.ops.prefix_attention import prefix_attention
from gpu.items import Context, Items, Number

CONFIG = GENERATORS["b"]
LAUNCHES = 3
items = Items()


@items("cached_attention")
def attend(context: Context) -> list[Number]:
    """Batch 8 with guidance, half-way through an image, another cache for each launch."""
    rows, heads, dim = context.pick(quick=2, full=16), CONFIG.num_heads, CONFIG.head_dim
    qkv = torch.randn(rows, 1, 3, heads, dim, device=context.device).bfloat16()
    arrivals = torch.zeros(rows * heads, dtype=torch.int32, device=context.device)
    positions = torch.full((rows,), CONFIG.num_tokens // 2, device=context.device)
    for _ in range(LAUNCHES):
        keys, values = torch.randn(2, rows, heads, CONFIG.num_tokens, dim, device=context.device).bfloat16()
        cached_attention(qkv, keys, values, positions, arrivals=arrivals)
    return []


@items("prefix_attention")
def attention(context: Context) -> list[Number]:
    """Forward and backward over a training batch of 64."""
    batch = context.pick(quick=1, full=64)
    shape = batch, 1 + CONFIG.num_tokens, 3, CONFIG.num_heads, CONFIG.head_dim
    qkv = torch.randn(shape, device=context.device).bfloat16().requires_grad_()
    for _ in range(LAUNCHES):
        out = prefix_attention(qkv, 0)
        torch.autograd.grad(out, qkv, torch.ones_like(out))
    return []


if __name__ == "__main__":
    items.main()
