"""Offsets beyond 2^31 elements, and the sizes that kernels cannot index: refused with a message.

A huge tensor that nobody wrote to is address space, not memory: on the CPU these tests touch a few pages of it.
"""

from __future__ import annotations

import pytest
import torch

from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.cached_attention import cached_attention
from alitok_fast.ops.prefix_attention import prefix_attention
from alitok_fast.ops.sample_tokens import sample_tokens
from alitok_fast.ops.swiglu import swiglu
from alitok_fast.ops.vq_lookup import vq_lookup
from alitok_fast.testing import assert_nearest

FAR = 2**31 + 64
"""Elements from one row to the next."""


def spread(x: torch.Tensor, stride: int = FAR) -> torch.Tensor:
    """x with its first dimension `stride` elements apart; skips where the device has no room."""
    size = (len(x) - 1) * stride + x[0].numel()
    try:
        memory = torch.empty(size, dtype=x.dtype, device=x.device)
    except RuntimeError as error:  # also torch.cuda.OutOfMemoryError
        pytest.skip(f"no room for {size * x.element_size() / 2**30:.0f} GiB: {error}")
    far = memory.as_strided(x.shape, (stride, *x.stride()[1:]))
    return far.copy_(x)


def randn(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", ["batch", "row"])
def test_prefix_attention_strides(target, by, dtype):
    qkv = randn(2, 2, 3, 2, 16, device=target, dtype=dtype)
    if by == "row":
        qkv = qkv[:1]
    far = spread(qkv) if by == "batch" else spread(qkv[0])[None]
    assert far.stride(0 if by == "batch" else 1) == FAR
    weights = {"q_norm_weight": randn(16, device=target), "k_norm_weight": randn(16, device=target)}
    results = []
    for x in (qkv, far):
        x = x.detach().requires_grad_()
        out = prefix_attention(x, 1, **weights)
        results.append([out, *torch.autograd.grad(out, x, torch.ones_like(out))])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_cached_attention_strides(target, cache_dtype):
    qkv = randn(2, 1, 3, 2, 16, device=target, dtype=torch.bfloat16)
    near = [randn(2, 2, 5, 16, device=target).to(cache_dtype) for _ in range(2)]
    far = [spread(cache) for cache in near]
    positions = torch.tensor([3, 2], device=target)
    results = [cached_attention(qkv, *caches, positions) for caches in (near, far)]
    assert torch.equal(*results)
    for a, b in zip(near, far, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_sample_tokens_strides(target):
    logits = randn(4, 100, device=target, dtype=torch.bfloat16)
    state = {"seed": 1, "step": 2, "image_ids": torch.arange(2, device=target), "guidance_scale": 2.0}
    assert torch.equal(sample_tokens(spread(logits), **state), sample_tokens(logits, **state))


def test_vq_lookup_strides(device):
    z, codebook = randn(2, 8, device=device), randn(3, 8, device=device)
    far = vq_lookup(spread(z), spread(codebook))
    assert all(torch.equal(a, b) for a, b in zip(far, vq_lookup(z, codebook), strict=True))


# ---- more than 2^31 elements, each of them worked on: on a GPU these are seconds, on the CPU minutes and memory ----


def needs(device: torch.device, gib: int) -> None:
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


@pytest.mark.device
def test_vq_lookup_of_all_elements(cuda):
    needs(cuda, 30)
    codebook, channels = torch.randn(8, 64, device=cuda), 64
    z = torch.randn(2**31 // channels + 500, channels, device=cuda)
    result = vq_lookup(z, codebook)
    for part in (slice(0, 300), slice(len(z) - 300, len(z))):
        assert_nearest(z[part], codebook, result.indices[part])
        assert torch.equal(result.quantized[part], codebook[result.indices[part]])
    assert int(result.usage.sum()) == len(z)


@pytest.mark.device
@pytest.mark.parametrize("operator", ["swiglu", "add_rms_norm"])
def test_elementwise_of_all_elements(cuda, operator):
    needs(cuda, 30)
    width = 1024
    x = torch.randn(2**31 // width + 3, width, device=cuda, dtype=torch.float16)
    if operator == "swiglu":
        got, of = swiglu(x, x), lambda x: swiglu(x, x)
    else:
        weight = torch.ones(width, device=cuda, dtype=torch.float16)
        got, of = add_rms_norm(x.float(), None, weight)[1], lambda x: add_rms_norm(x.float(), None, weight)[1]
    for part in (slice(0, 3), slice(len(x) - 3, len(x))):
        assert torch.equal(got[part], of(x[part].contiguous()))


@pytest.mark.device
def test_prefix_attention_of_all_elements(cuda):
    needs(cuda, 40)
    batch, length, heads, dim = 1400, 274, 16, 120
    qkv = torch.randn(batch, length, 3, heads, dim, device=cuda, dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    qkv.requires_grad_()
    out = prefix_attention(qkv, 0)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    last = qkv[-1:].detach().requires_grad_()
    expected = prefix_attention(last, 0)
    assert torch.equal(out[-1:], expected)
    assert torch.equal(grad[-1:], torch.autograd.grad(expected, last, torch.ones_like(expected))[0])


# ---- refused ----


def empty(*shape, dtype=torch.float32):
    """Of that size without memory: everything lies on one element."""
    return torch.empty((), dtype=dtype).expand(shape)


def call_cached_attention(rows=1, capacity=4):
    qkv, cache = empty(rows, 1, 3, 1, 8), torch.empty(1, 1, capacity, 8)
    positions = empty(rows, dtype=torch.int64)
    return cached_attention(qkv if rows > 1 else qkv.contiguous(), cache, cache.clone(), positions)


def call_quantized_linear(rows=1, outputs=1):
    x, weight = torch.empty(rows, 0), torch.empty(outputs, 0, dtype=torch.int8)
    return torch.ops.alitok.quantized_linear(x, weight, empty(outputs), None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vq_lookup(empty(2**31, 1), torch.ones(2, 1)), r"z: expected less than 2\^31 features, got shape"),
        (lambda: vq_lookup(torch.ones(2, 1), empty(2**31, 1)), r"codebook: expected 1 to 2\^31 - 1 codes, got shape"),
        (lambda: vq_lookup(empty(1, 2097121), empty(1, 2097121)), "z: expected at most 2097120 channels, got shape"),
        (lambda: prefix_attention(empty(1, 4194241, 3, 1, 8), 0), "qkv: expected L at most 4194240 and B . H below"),
        (lambda: prefix_attention(empty(2**30, 1, 3, 2, 8), 0), r"qkv: expected L at .* and B \* H below 2\*\*31, got"),
        (lambda: add_rms_norm(torch.empty(2**31, 0), None, torch.ones(0)), r"x: expected fewer than 2\^31 rows, got"),
        (lambda: call_quantized_linear(rows=1048561), "x: expected at most 1048560 rows, got shape"),
        (lambda: call_quantized_linear(outputs=2**31), r"weight: expected fewer than 2\^31 outputs, got shape"),
        (lambda: call_cached_attention(rows=2**31), r"qkv: expected R \* W \* H below 2\^31, W below 2\^16, got"),
        (lambda: call_cached_attention(capacity=16385), "keys: expected at most 16384 positions, got shape"),
    ],
)
def test_sizes_beyond_the_kernels_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
