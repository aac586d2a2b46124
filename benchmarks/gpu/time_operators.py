"""Each operator at the shapes of B, beside the least time for its bytes and operations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast.config import GENERATORS, TOKENIZERS
from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.cached_attention import cached_attention
from alitok_fast.ops.fused_linear import CLUSTER_ROWS, LinearWeights, has_clusters, linear_add, norm_linear
from alitok_fast.ops.norm_head import norm_head
from alitok_fast.ops.quantized_linear import quantize_weight, quantized_linear
from alitok_fast.ops.sample_tokens import sample_tokens
from alitok_fast.ops.swiglu import swiglu
from alitok_fast.ops.vq_lookup import vq_lookup
from gpu.items import Context, Items, Number
from gpu.torch_alone import graphed

CONFIG = GENERATORS["b"]
COLD_BYTES = 2**27  # more than twice the last cache of an H100
REPEATS = 20  # of a call whose data a step leaves in the cache anyway
items = Items()


def randn(context: Context, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=context.device, dtype=torch.float32).to(dtype)


def timed(context: Context, name: str, calls: Sequence[Callable[[], object]], **work) -> Number:
    """One of `calls`, one after the other in one graph: the launch of a graph costs as much as a small kernel."""
    run = graphed(lambda: [call() for call in calls], context)
    return context.timed(name, context.seconds(run), len(calls), unit="us", **work)


def copies(context: Context, bytes_each: int) -> int:
    """How many buffers are worked on in turn so that no cache holds them, as a step finds weights and keys."""
    return context.pick(quick=2, full=max(CONFIG.num_layers, -(-COLD_BYTES // bytes_each)))


@items("cached_attention")
def time_cached_attention(context: Context) -> list[Number]:
    """Half-way through an image."""
    numbers = []
    position = CONFIG.num_tokens // 2
    for batch in context.pick(quick=(1,), full=(1, 8, 64, 256)):
        rows, heads, dim = 2 * batch, CONFIG.num_heads, CONFIG.head_dim
        qkv, at = randn(context, rows, 1, 3, heads, dim), torch.full((rows,), position, device=context.device)
        arrivals = torch.zeros(rows * heads, dtype=torch.int32, device=context.device)
        for stored in (torch.bfloat16, torch.float8_e4m3fn):
            read = 2 * rows * heads * (position + 1) * dim * stored.itemsize
            shape = 2, rows, heads, CONFIG.num_tokens, dim
            caches = [randn(context, *shape).to(stored) for _ in range(copies(context, read))]
            calls = [partial(cached_attention, qkv, *cache, at, arrivals=arrivals) for cache in caches]
            name = f"batch {batch}, cache {str(stored).removeprefix('torch.')}"
            key = f"attend {batch}" if stored == torch.bfloat16 and batch != 8 else ""
            numbers.append(timed(context, name, calls, read=read, key=key))
            del caches, calls
    return numbers


@items("quantized_linear")
def time_quantized_linear(context: Context) -> list[Number]:
    """qkv; from 33 rows on the weights are written out for torch's product."""
    numbers = []
    weight = torch.randn(3 * CONFIG.width, CONFIG.width, device=context.device)
    for stored in (torch.int8, torch.float8_e4m3fn):
        first = quantize_weight(weight, stored)
        read = sum(t.nbytes for t in first)
        packed = [[t.clone() for t in first] for _ in range(copies(context, read))]
        for rows in context.pick(quick=(2,), full=(2, 16, 32, 128)):
            x = randn(context, rows, CONFIG.width)
            calls = [partial(quantized_linear, x, *pair) for pair in packed]
            work = dict(read=read, flops=2.0 * rows * weight.numel())
            numbers.append(timed(context, f"{str(stored).removeprefix('torch.')}, {rows} rows", calls, **work))
    return numbers


KERNELS = {"as a step takes it": None, "few rows": range(0), "clusters": range(1, 129)}
"""Of a fused product, by the rows for which it is the one by clusters. Without those torch takes more than 32 rows."""


@items("fused_linear")
def time_fused_linear(context: Context) -> list[Number]:
    """The four of a block, one after the other as a step runs them: each needs what the one before has written."""
    numbers, norm = [], torch.ones(CONFIG.width, device=context.device, dtype=torch.bfloat16)
    shapes = {
        "qkv": (3 * CONFIG.width, CONFIG.width),
        "proj": (CONFIG.width, CONFIG.width),
        "w1": (CONFIG.hidden, CONFIG.width),
        "w3": (CONFIG.hidden, CONFIG.width),
        "w2": (CONFIG.width, CONFIG.hidden),
    }

    def block(layers: dict[str, LinearWeights], x: Tensor, delta: Tensor | None = None) -> None:
        x, packed = norm_linear(x, delta, norm, 1e-5, layers["qkv"])
        x, delta = linear_add(x, packed[:, : CONFIG.width].contiguous(), layers["proj"])
        x, gated = norm_linear(x, delta, norm, 1e-5, layers["w3"], layers["w1"])
        linear_add(x, gated, layers["w2"])

    clusters = context.device.type == "cuda" and has_clusters(context.device)
    for stored in (torch.bfloat16, torch.int8):
        blocks = []
        for _ in range(context.pick(quick=2, full=CONFIG.num_layers)):
            wide = {name: randn(context, *shape) / 30 for name, shape in shapes.items()}
            packed = {
                name: (w,) if stored == torch.bfloat16 else quantize_weight(w, stored) for name, w in wide.items()
            }
            blocks.append({name: LinearWeights(*tensors) for name, tensors in packed.items()})
        read = sum(t.nbytes for layer in blocks[0].values() for t in layer if t is not None)
        for rows in context.pick(quick=(2,), full=(2, 8, 16, 32, 64, 128)):
            x = randn(context, rows, CONFIG.width, dtype=torch.float32)
            calls = [partial(block, layers, x) for layers in blocks]
            for kernel, taken in KERNELS.items():
                if taken is not None and (not clusters or (stored == torch.int8 and rows > 32 and not len(taken))):
                    continue
                name = f"{str(stored).removeprefix('torch.')}, {rows} rows, a block and a copy, {kernel}"
                key = f"block {rows}" if rows == 2 and taken is None else ""
                with taking_clusters(stored, taken):
                    numbers.append(timed(context, name, calls, read=read, key=key))
    return numbers


@contextlib.contextmanager
def taking_clusters(stored: torch.dtype, rows: range | None) -> Iterator[None]:
    """Within, fused products of `rows` are those by clusters; None leaves them as they are."""
    usual = CLUSTER_ROWS[stored]
    CLUSTER_ROWS[stored] = usual if rows is None else rows
    try:
        yield
    finally:
        CLUSTER_ROWS[stored] = usual


@items("norm_head")
def time_norm_head(context: Context) -> list[Number]:
    """Each with weights of its own, beside the two operators that it stands for."""
    numbers, norm = [], torch.ones(CONFIG.width, device=context.device)
    read = 4 * CONFIG.codebook_size * CONFIG.width
    heads = [
        (randn(context, CONFIG.codebook_size, CONFIG.width, dtype=torch.float32),
         torch.zeros(CONFIG.codebook_size, device=context.device))
        for _ in range(copies(context, read))
    ]  # fmt: skip

    def apart(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(add_rms_norm(x, None, norm, 1e-5)[1], weight, bias)

    for rows in context.pick(quick=(2,), full=(2, 16, 32)):
        x = randn(context, rows, CONFIG.width, dtype=torch.float32)
        work = dict(read=read, flops=read / 2 * rows, rate="fp32_flops")
        calls = [partial(norm_head, x, None, norm, 1e-5, *head) for head in heads]
        numbers.append(timed(context, f"{rows} rows", calls, **work))
        calls = [partial(apart, x, *head) for head in heads]
        numbers.append(timed(context, f"{rows} rows, norm and torch's product", calls, **work))
    return numbers


@items("add_rms_norm, swiglu")
def time_elementwise(context: Context) -> list[Number]:
    """A step's rows, then those of a training batch, forward and backward."""
    numbers = []
    width, hidden = CONFIG.width, CONFIG.hidden
    for rows in context.pick(quick=(2, 274), full=(2, 128, 64 * 274)):
        x, weight = randn(context, rows, width, dtype=torch.float32), randn(context, width)
        delta, gate, up = (randn(context, rows, columns) for columns in (width, hidden, hidden))
        norm, gated = partial(add_rms_norm, x, delta, weight), partial(swiglu, gate, up)
        bytes_ = 2 * x.nbytes + 2 * delta.nbytes
        numbers.append(timed(context, f"add_rms_norm, {rows} rows", [norm] * REPEATS, read=bytes_))
        numbers.append(timed(context, f"swiglu, {rows} rows", [gated] * REPEATS, read=3 * gate.nbytes))
    leaves = [t.requires_grad_() for t in (x, delta, weight)]
    directions = [torch.randn_like(x), torch.randn_like(delta)]

    seed = torch.tensor([1], device=context.device)

    def forward_backward() -> None:
        torch.autograd.grad(add_rms_norm(*leaves, dropout=0.1, seed=seed), leaves, directions)

    read = 5 * x.nbytes + 4 * delta.nbytes  # x, sum; sum, grad_sum, grad_x; each delta or normed and its gradient
    numbers.append(timed(context, f"add_rms_norm, {rows} rows, with backward", [forward_backward] * 4, read=read))
    return numbers


@items("sample_tokens")
def time_sample_tokens(context: Context) -> list[Number]:
    numbers = []
    seed, step, scale = (torch.tensor(v, device=context.device) for v in (1, 7, 3.0))
    for batch in context.pick(quick=(1,), full=(1, 64, 256)):
        logits = randn(context, 2 * batch, CONFIG.codebook_size, dtype=torch.float32)
        ids = torch.arange(batch, device=context.device)
        for name, rule in (("plain", {}), ("top-k 50, top-p 0.9", dict(top_k=50, top_p=0.9))):
            keys = dict(guidance_scale=scale, seed=seed, image_ids=ids, step=step)
            call = partial(sample_tokens, logits, **keys, **rule)
            numbers.append(timed(context, f"batch {batch}, {name}", [call] * REPEATS, read=logits.nbytes))
    return numbers


@items("vq_lookup")
def time_vq_lookup(context: Context) -> list[Number]:
    config = TOKENIZERS["256"]
    features = context.pick(quick=1, full=64) * config.num_tokens
    z = randn(context, features, config.code_dim, dtype=torch.float32)
    codebook = randn(context, config.codebook_size, config.code_dim, dtype=torch.float32)
    work = dict(read=z.nbytes + codebook.nbytes, flops=2.0 * z.numel() * len(codebook), rate="fp32_flops")
    training, encoding = partial(vq_lookup, z, codebook), partial(vq_lookup, z, codebook, with_closest=False)
    return [
        timed(context, f"{features} features, forward", [training] * 4, **work),
        timed(context, f"{features} features, encoding", [encoding] * 4, **work),
    ]


if __name__ == "__main__":
    items.main()
