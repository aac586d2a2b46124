"""Calls of every operator that are right, for the fuzzer: how to make arguments, and what they should give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from alitok_fast._library import use_reference
from alitok_fast.ops.decode_weights import LayerWeights, PackedWeights, pack_weights

# By import_module: `alitok_fast.ops` has functions of the same names.
norm, bf16, cached, dec, int8, dense, prefix, quantized, sampling, gated, vq = (
    import_module(f"alitok_fast.ops.{name}")
    for name in (
        "add_rms_norm", "bf16_linear", "cached_attention", "decode", "int8_linear", "linear", "prefix_attention",
        "quantized_linear", "sample_tokens", "swiglu", "vq_lookup",
    )
)  # fmt: skip

ops = torch.ops.alitok
Arguments = dict[str, Any]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def close(actual: Tensor, wanted: Tensor) -> None:
    """Up to a rounding or two in the dtype, relative to the largest number; NaN where NaN is."""
    a, b = actual.double(), wanted.double()
    assert torch.equal(a.isnan(), b.isnan())
    eps = torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0
    scale = b.nan_to_num(0, 0, 0).abs().amax().item() if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=0, atol=16 * max(eps, 1e-6) * max(scale, 1e-3), equal_nan=True)


def near(actual: Tensor, wanted: Tensor) -> None:
    """Gradients of what was rounded to 16 bits on the way."""
    a, b = actual.double(), wanted.double()
    assert torch.equal(a.isnan(), b.isnan())
    scale = b.nan_to_num(0, 0, 0).abs().amax().item() if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=0, atol=0.05 * max(scale, 1.0), equal_nan=True)


def same_shape(actual: Tensor, wanted: Tensor) -> None:
    """Where two roundings may take two decisions."""


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[tuple[int, ...], torch.Generator], Arguments]
    call: Callable[[Arguments], Any]
    reference: Callable[[Arguments], Any]
    written: tuple[str, ...] = ()
    compare: Callable[[Tensor, Tensor], None] = close
    public: bool = False


def randn(*shape, generator, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def operator(name: str) -> Callable[[Arguments], Any]:
    return lambda arguments: getattr(ops, name)(*arguments.values())


def positional(function: Callable[..., Any]) -> Callable[[Arguments], Any]:
    return lambda arguments: function(*arguments.values())


# ---- arguments ----


def swiglu_arguments(s, g):
    dtype, shape = FLOATS[s[2] % 3], (s[0], s[1])
    return {"gate": randn(*shape, generator=g, dtype=dtype), "up": randn(*shape, generator=g, dtype=dtype)}


def norm_arguments(s, g):
    rows, width, dtype = s[0], s[1] + 1, FLOATS[s[2] % 3]
    return {
        "x": randn(rows, width, generator=g),
        "delta": randn(rows, width, generator=g, dtype=dtype) if s[3] % 3 else None,
        "weight": randn(width, generator=g, dtype=dtype), "eps": 1e-5,
        "dropout": 0.25 if s[3] % 3 == 2 else 0.0, "seed": torch.tensor(s[3]),
    }  # fmt: skip


def norm_backward_arguments(s, g):
    rows, width, dtype = s[0], s[1] + 1, FLOATS[s[2] % 3]
    return {
        "grad_sum": randn(rows, width, generator=g), "grad_normed": randn(rows, width, generator=g, dtype=dtype),
        "x": randn(rows, width, generator=g), "weight": randn(width, generator=g, dtype=dtype), "eps": 1e-5,
        "dropout": 0.0, "seed": torch.tensor(s[3]),
    }  # fmt: skip


def norm_backward(a):
    """By autograd of the reference, in float32."""
    x, weight = (a[name].float().requires_grad_() for name in ("x", "weight"))
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=a["eps"]) * weight
    grads = torch.autograd.grad(normed, (x, weight), a["grad_normed"].float())
    if a["grad_sum"] is None:
        return grads[0], a["grad_normed"].new_empty(0), grads[1]
    grad_x = grads[0] + a["grad_sum"]
    return grad_x, grad_x.to(a["grad_normed"].dtype), grads[1]


def int8_arguments(s, g):
    rows, inputs, outputs = s[0], 8 * s[1], 5 * s[2]
    return {
        "x": randn(rows, inputs, generator=g, dtype=FLOATS[s[3] % 2]),
        "weight": int8.pack_int8(randn(outputs, inputs, generator=g)) if outputs and inputs else
        torch.zeros(-(-outputs // 32), -(-inputs // 64), 2176, dtype=torch.uint8),
        "bias": randn(outputs, generator=g) if s[3] % 4 < 2 else None,
        "outputs": outputs, "dtype": FLOATS[s[3] // 4 % 2],
    }  # fmt: skip


def bf16_arguments(s, g):
    rows, inputs, outputs = s[0], 8 * s[1], 5 * s[2]
    return {
        "x": randn(rows, inputs, generator=g, dtype=FLOATS[s[3] % 2]),
        "weight": bf16.pack_bf16(randn(outputs, inputs, generator=g)),
        "bias": randn(outputs, generator=g) if s[3] % 4 < 2 else None,
        "outputs": outputs, "dtype": FLOATS[s[3] // 4 % 2],
    }  # fmt: skip


def linear_arguments(s, g):
    rows, inputs, outputs = s[0], 8 * s[1], 5 * s[2]
    return {
        "x": randn(rows, inputs, generator=g, dtype=torch.bfloat16),
        "weight": randn(outputs, inputs, generator=g, dtype=FLOATS[s[3] % 2]),
        "bias": randn(outputs, generator=g) if s[3] % 4 < 2 else None,
    }


def linear_backward_arguments(s, g):
    a = linear_arguments(s, g)
    grad = randn(len(a["x"]), len(a["weight"]), generator=g, dtype=torch.bfloat16)
    return {"grad": grad, "x": a["x"], "weight": a["weight"], "wanted": [True, True, True]}


def linear_backward(a):
    grad, x, weight = (a[name].float() for name in ("grad", "x", "weight"))
    return (grad @ weight.bfloat16().float()).bfloat16(), grad.T @ x, grad.sum(0)


def swiglu_backward_arguments(s, g):
    a = swiglu_arguments(s, g)
    return {"grad": randn(*a["gate"].shape, generator=g, dtype=a["gate"].dtype), **a}


def swiglu_backward(a):
    leaves = [a[name].float().requires_grad_() for name in ("gate", "up")]
    grads = torch.autograd.grad(gated.swiglu_reference(*leaves), leaves, a["grad"].float())
    return tuple(grad.to(a["gate"].dtype) for grad in grads)


def quantized_arguments(s, g):
    rows, inputs, outputs, dtype = s[0], 8 * s[1] + 1, s[2] + 1, FLOATS[s[3] % 3]
    weight, scale = quantized.quantize_weight(
        randn(outputs, inputs, generator=g), (torch.int8, torch.float8_e4m3fn)[s[3] % 2]
    )
    bias = randn(outputs, generator=g, dtype=dtype) if s[3] % 4 < 2 else None
    return {"x": randn(rows, inputs, generator=g, dtype=dtype), "weight": weight, "scale": scale, "bias": bias}


def sample_arguments(s, g):
    batch, codes, guided = s[0], 7 * s[1] + 1, s[2] % 2
    return {
        "logits": randn(batch * (1 + guided), codes, generator=g, dtype=FLOATS[s[2] % 3]),
        "guidance_scale": torch.tensor(2.0) if guided else None, **rule(batch, s, g), "seed": torch.tensor(s[3]),
        "image_ids": torch.arange(batch), "step": torch.tensor(s[0]),
    }  # fmt: skip


def rule(batch, s, g):
    """Settings for all images, or for each of them."""
    shape = (batch,) if s[1] % 2 else ()
    return {
        "temperature": torch.rand(shape, generator=g).round(), "top_k": torch.randint(s[3] + 2, shape, generator=g),
        "top_p": 1 - torch.rand(shape, generator=g, dtype=torch.float64).mul(4).floor() / 4,
    }  # fmt: skip


def cached_arguments(s, g):
    rows, heads, capacity, dim, dtype = s[0], s[1] % 3 + 1, s[2] + 1, 8 * (s[3] % 3 + 1), FLOATS[s[3] % 3]
    columns = s[3] % 3 + 1
    normed, cache_dtype = s[2] % 2, torch.float8_e4m3fn if s[0] % 3 == 2 and dtype != torch.float32 else dtype
    return {
        "qkv": randn(rows, columns, 3, heads, dim, generator=g, dtype=dtype),
        "keys": randn(rows + s[2] % 2, heads, capacity, dim, generator=g).to(cache_dtype),
        "values": randn(rows + s[2] % 2, heads, capacity, dim, generator=g).to(cache_dtype),
        "positions": torch.randint(-1, capacity + 1, (rows,), generator=g),
        "slots": torch.randperm(rows + s[2] % 2, generator=g)[:rows] if s[0] % 2 else None,
        "q_norm_weight": randn(dim, generator=g) if normed else None,
        "k_norm_weight": randn(dim, generator=g) if normed else None, "norm_eps": 1e-5,
        "rope": randn(capacity, dim // 2, 2, generator=g) if s[1] % 2 else None, "scale": 0.3,
        "arrivals": torch.zeros(rows * columns * heads, dtype=torch.int32) if s[0] % 2 else None,
    }  # fmt: skip


def prefix_arguments(s, g):
    batch, length, heads, dim = s[0] % 4, 3 * s[1] + 1, s[2] % 3 + 1, 8 * (s[3] % 3 + 1)
    return {
        "qkv": randn(batch, length, 3, heads, dim, generator=g, dtype=FLOATS[s[2] % 3]),
        "prefix_len": s[3] % (length + 1),
        "q_norm_weight": randn(dim, generator=g) if s[1] % 2 else None,
        "k_norm_weight": randn(dim, generator=g) if s[1] % 2 else None, "norm_eps": 1e-5,
        "rope": randn(length, dim // 2, 2, generator=g) if s[0] % 2 else None, "scale": 0.3,
        "dropout": 0.25 if s[0] % 3 == 2 else 0.0, "seed": torch.tensor(s[3]),
    }  # fmt: skip


def prefix_backward_arguments(s, g):
    forward = prefix_arguments(s, g)
    out, lse = prefix.prefix_attention_reference(*forward.values())
    qkv = forward.pop("qkv")
    grad = randn(*out.shape, generator=g, dtype=out.dtype)
    return {"grad_out": grad, "qkv": qkv, "out": out, "lse": lse, **forward}


def prefix_backward(a):
    """By autograd of the reference."""
    with torch.enable_grad():
        forward = {name: value for name, value in a.items() if name not in ("grad_out", "out", "lse")}
        wanted = [name for name in ("qkv", "q_norm_weight", "k_norm_weight") if forward[name] is not None]
        for name in wanted:
            forward[name] = forward[name].detach().requires_grad_()
        out = prefix.prefix_attention_reference(*forward.values())[0]
        grads = torch.autograd.grad(out, [forward[name] for name in wanted], a["grad_out"])
    return [*grads, *[a["lse"].new_zeros(0)] * (3 - len(grads))]


def vq_arguments(s, g):
    channels = s[2] + 1
    return {
        "z": randn(s[0], channels, generator=g), "codebook": randn(9 * s[1] + 1, channels, generator=g),
        "commitment": 0.25, "with_closest": bool(s[3] % 2),
    }  # fmt: skip


def vq_reference(a):
    r = vq.vq_lookup_reference(*a.values())
    return [*r[:4], a["z"].new_empty(0, dtype=torch.int64) if r.closest is None else r.closest]


def vq_backward_arguments(s, g):
    features, codes, channels = s[0], s[1] + 1, s[2] + 1
    return {
        "grad_quantized": randn(features, channels, generator=g), "grad_loss": torch.tensor(1.5),
        "z": randn(features, channels, generator=g), "codebook": randn(codes, channels, generator=g),
        "indices": torch.randint(codes, (features,), generator=g), "commitment": 0.25,
    }  # fmt: skip


def vq_backward(a):
    difference = a["codebook"][a["indices"]] - a["z"]
    scale = 2 / max(a["z"].numel(), 1) * a["grad_loss"]
    grad_codebook = torch.zeros_like(a["codebook"]).index_add(0, a["indices"], scale * difference)
    return a["grad_quantized"] - a["commitment"] * scale * difference, grad_codebook


def packed(heads: int, head_dim: int, codes: int, capacity: int, dtype: torch.dtype, g) -> PackedWeights:
    width, hidden = heads * head_dim, 11

    def m(*shape):
        return randn(*shape, generator=g) * 0.3

    layer = LayerWeights(
        m(width) + 1, m(3 * width, width), m(3 * width), m(head_dim) + 1, m(head_dim) + 1, m(width, width), m(width),
        m(width) + 1, m(hidden, width), m(hidden, width), m(width, hidden),
    )  # fmt: skip
    rope = m(capacity, head_dim // 2, 2)
    return pack_weights([layer], m(width) + 1, m(codes, width), m(codes), m(codes + 1, width), rope, dtype)


def decode_arguments(s, g):
    heads, head_dim, capacity, codes = s[1] % 2 + 1, 2 * (s[2] % 4 + 1), s[3] + 2, 5 * s[1] + 2
    dtype = (torch.float32, torch.bfloat16, torch.int8)[s[0] % 3]
    p = packed(heads, head_dim, codes, capacity, dtype, g)
    rows, columns = 2 * (s[0] % 3 + 1), min(s[1] % 3 + 1, capacity)
    cache = (1, rows + s[3] % 2, heads, capacity, head_dim)
    return {
        "arena": p.arena, "vectors": p.vectors, "embeddings": p.embeddings, "rope": p.rope,
        "ids": torch.randint(codes, (rows, columns), generator=g), "keys": randn(*cache, generator=g),
        "values": randn(*cache, generator=g),
        "positions": torch.randint(-1, capacity - columns + 1, (rows,), generator=g),
        "slots": torch.randperm(cache[1], generator=g)[:rows] if s[3] % 2 else None, "hidden": p.hidden,
        "codes": p.codes, "weight_bytes": p.dtype.itemsize,
        "activation_bytes": p.activation_dtype.itemsize, "norm_eps": p.norm_eps,
    }  # fmt: skip


WEIGHTS = {4: torch.float32, 2: torch.bfloat16, 1: torch.int8}


def weights_of(a) -> PackedWeights:
    dtype = WEIGHTS[a["weight_bytes"]]
    return PackedWeights(a["arena"], a["vectors"], a["embeddings"], a["rope"], dtype, dtype, a["hidden"], a["codes"],
                         a["norm_eps"])  # fmt: skip


def decode_tokens_arguments(s, g):
    a = decode_arguments(s, g)
    batch, capacity = len(a["ids"]) // 2, a["keys"].shape[3]
    a["positions"] = torch.randint(-1, capacity, (batch,), generator=g).repeat(2)
    last = {name: a.pop(name) for name in ("hidden", "codes", "weight_bytes", "activation_bytes", "norm_eps")}
    return {
        **a, "tokens": torch.randint(last["codes"], (batch, capacity), generator=g),
        "prompt_lengths": torch.randint(capacity + 2, (batch,), generator=g), "schedule": torch.ones(batch, capacity),
        **rule(batch, (0, 1, *s[2:]), g), "seeds": torch.arange(batch), "image_ids": torch.arange(batch),
        "passes_done": torch.zeros(batch, dtype=torch.int64), "passes": s[3] % 3 + 1,
        "window": s[0] % a["ids"].shape[1] + 1, **last,
    }  # fmt: skip


def decode_tokens(a):
    names = ("ids", "positions", "tokens", "prompt_lengths", "schedule", "temperature", "top_k", "top_p", "seeds",
             "image_ids")  # fmt: skip
    drawing = dec.SampleState(**{name: a[name] for name in names}, passes=a["passes_done"], slots=a["slots"])
    dec.decode_tokens_reference(weights_of(a), drawing, a["keys"], a["values"], a["passes"], a["window"])


CASES = [
    Case("swiglu", swiglu_arguments, operator("swiglu"), positional(gated.swiglu_reference)),
    Case("swiglu_backward", swiglu_backward_arguments, operator("swiglu_backward"), swiglu_backward, compare=near),
    Case("add_rms_norm", norm_arguments, operator("add_rms_norm"), positional(norm.add_rms_norm_reference)),
    Case("add_rms_norm_backward", norm_backward_arguments, operator("add_rms_norm_backward"), norm_backward,
         compare=near),
    Case("bf16_linear", bf16_arguments, operator("bf16_linear"), positional(bf16.bf16_linear_reference)),
    Case("linear", linear_arguments, operator("linear"), positional(dense.linear_reference)),
    Case("linear_backward", linear_backward_arguments, operator("linear_backward"), linear_backward, compare=near),
    Case("int8_linear", int8_arguments, operator("int8_linear"), positional(int8.int8_linear_reference)),
    Case("quantized_linear", quantized_arguments, operator("quantized_linear"),
         positional(quantized.quantized_linear_reference)),
    Case("sample_tokens", sample_arguments, operator("sample_tokens"), positional(sampling.sample_tokens_reference),
         compare=same_shape),
    Case("cached_attention", cached_arguments, operator("cached_attention"),
         positional(cached.cached_attention_reference), written=("keys", "values")),
    Case("prefix_attention", prefix_arguments, operator("prefix_attention"),
         positional(prefix.prefix_attention_reference)),
    Case("prefix_attention_backward", prefix_backward_arguments, operator("prefix_attention_backward"),
         prefix_backward, compare=near),
    Case("vq_lookup", vq_arguments, operator("vq_lookup"), vq_reference),
    Case("vq_lookup_backward", vq_backward_arguments, operator("vq_lookup_backward"), vq_backward),
    Case("decode", decode_arguments, operator("decode"),
         lambda a: dec.decode_reference(weights_of(a), a["ids"], a["keys"], a["values"], a["positions"], a["slots"]),
         written=("keys", "values"), compare=same_shape),
    Case("decode_tokens", decode_tokens_arguments, operator("decode_tokens"), decode_tokens,
         written=("ids", "keys", "values", "positions", "tokens", "passes_done"), compare=same_shape),
]  # fmt: skip


# ---- public functions: against themselves with reference operators ----


def public(name: str, make: Callable[..., Arguments], call: Callable[[Arguments], Any], **options) -> Case:
    def reference(arguments: Arguments) -> Any:
        with use_reference():
            return call(arguments)

    return Case(f"public {name}", make, call, reference, public=True, **options)


PUBLIC = [
    public("swiglu", swiglu_arguments, lambda a: gated.swiglu(**a)),
    public("add_rms_norm", norm_arguments, lambda a: norm.add_rms_norm(**a)),
    public("bf16_linear", bf16_arguments, lambda a: bf16.bf16_linear(**a)),
    public("linear", linear_arguments, lambda a: dense.linear(**a)),
    public("int8_linear", int8_arguments, lambda a: int8.int8_linear(**a)),
    public("quantized_linear", quantized_arguments, lambda a: quantized.quantized_linear(**a)),
    public("sample_tokens", sample_arguments, lambda a: sampling.sample_tokens(**a), compare=same_shape),
    public("cached_attention", cached_arguments, lambda a: cached.cached_attention(
        a["qkv"], a["keys"], a["values"], a["positions"], **{k: a[k] for k in list(a)[4:]}),
        written=("keys", "values")),
    public("prefix_attention", prefix_arguments, lambda a: prefix.prefix_attention(
        a["qkv"], a["prefix_len"], **{k: a[k] for k in list(a)[2:]})),
    public("vq_lookup", vq_arguments, lambda a: vq.vq_lookup(**a)),
]  # fmt: skip
