"""cached_attention over a full cache at the generator's shapes, beside torch's attention with a static cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alitok_fast.config import GENERATORS
from alitok_fast.ops import cached_attention
from alitok_fast.ops.cached_attention import cached_attention_reference
from alitok_fast.ops.prefix_attention import rms_norm, rotate
from alitok_fast.testing import relative_error

EPS = 1e-5


def static_cache(qkv, keys, values, position, weight, rope, visible):
    """What a sampling loop in torch does: norm, rotate, write, attend with a mask."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (R, H, 1, D)
    q, k = (rotate(rms_norm(x, weight, EPS), rope.index_select(0, position)) for x in (q, k))
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible).transpose(1, 2)


@pytest.mark.quick("b-2-fp32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize("size", ["b", "xl"])
def bench_cached_attention(size, rows, dtype, mode, device, compare):
    config = GENERATORS[size]
    heads, dim = config.num_heads, config.width // config.num_heads
    capacity = mode.pick(check=19, quick=config.num_tokens, full=config.num_tokens)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, 1, 3, heads, dim, generator=generator).to(device, dtype)
    keys, values = torch.randn(2, rows, heads, capacity, dim, generator=generator).to(device, dtype).unbind(0)
    angles = torch.rand(capacity, dim // 2, generator=generator).to(device)
    rope, weight = torch.stack([angles.cos(), angles.sin()], -1), torch.ones(dim, device=device)
    position = torch.tensor([capacity - 1], device=device)
    visible, positions = (torch.arange(capacity, device=device) <= position)[None], position.expand(rows).contiguous()

    def own():
        return cached_attention(qkv, keys, values, positions, q_norm_weight=weight, k_norm_weight=weight, rope=rope)

    def reference():
        return cached_attention_reference(qkv, keys, values, positions, None, weight, weight, EPS, rope, dim**-0.5)

    wide = [t.double() for t in (qkv, keys, values)]
    exact = cached_attention_reference(*wide, positions, None, weight, weight, EPS, rope, dim**-0.5)
    assert relative_error(own(), exact) <= 8 * torch.finfo(dtype).eps
    functions = {
        "SDPA, static cache": lambda: static_cache(qkv, keys, values, position, weight, rope, visible),
        "reference": reference,
    }
    assert relative_error(functions["SDPA, static cache"](), exact) <= 16 * torch.finfo(dtype).eps
    compare(own, functions, keys.nbytes + values.nbytes, "read_bytes")
