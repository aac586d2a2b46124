"""Attention with one mask for the whole system: position i sees position j when j < prefix_len or j <= i."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast._library import native_enabled, register_autograd, register_fake
from alitok_fast.ops.arguments import (
    check_one_device,
    check_optional_tensors,
    check_tensors,
    integer,
    number,
    real,
    without_autocast,
)
from alitok_fast.ops.derivatives import differentiated_once, refuse_transforms
from alitok_fast.ops.dropout import keep_mask, seed_tensor


def prefix_attention(
    qkv: Tensor,
    prefix_len: int,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    rope: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """Softmax attention over packed queries, keys and values, under a prefix mask.

    `prefix_len` 0 is causal attention, `prefix_len` L is bidirectional attention, and values between them make a prefix
    language model.

    Source: AliTok, arXiv 2506.05289, section 3: the encoder and the stage-2 decoder are bidirectional, the stage-1
    decoder and the generator are causal.

    Devices: CPU and CUDA. The dtype of the result is that of `qkv`, also under autocast.

    Gradients: with respect to `qkv` and the norm weights, once; they are the same in every run and for every number of
    threads. Second derivatives, gradients of `rope`, forward-mode derivatives and those of `torch.func` are refused.
    `torch.vmap` runs the operator once per element; with an explicit `seed` each element gets the same dropout mask.

    Args:
        qkv: (B, L, 3, H, D), float32, bfloat16 or float16; D a multiple of 8 up to 128, L up to 4,194,240.
        prefix_len: 0..L, the number of keys that every position sees.
        q_norm_weight: (D,) floating point, or None. RMSNorm over D on the queries: computed in float32, rounded to the
            dtype of `qkv`, then multiplied by the weight in that dtype.
        k_norm_weight: (D,), the same for the keys; given exactly where `q_norm_weight` is.
        norm_eps: a number >= 0, added to the mean square.
        rope: (L, D / 2, 2) float32, (cos, sin) of each interleaved pair (x0, x1) -> (x0 c - x1 s, x0 s + x1 c),
            applied after the norm. A row of zeros makes that position's query and key zero vectors. None rotates
            nothing.
        scale: finite factor on the logits; None is D ** -0.5.
        dropout: probability in [0, 1), rounded to a multiple of 2**-16, of dropping an attention probability.
        seed: the key of the dropout mask, see `dropout_keep_mask`: an int in the range of int64, or an int64 tensor of
            one element on the device of `qkv`. None takes a key from torch's default generator.

    Returns:
        (B, L, H, D) in the dtype of `qkv`. Sums and softmax are float32.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for shapes, dtypes, devices or values that do not fit. The message names the argument, what was
            expected and what was given.
        RuntimeError: for a derivative that the operator does not have.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    check_tensors(qkv=qkv)
    check_optional_tensors(q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, rope=rope)
    if qkv.ndim != 5:
        raise ValueError(f"qkv: expected 5 dimensions, got shape {tuple(qkv.shape)}")
    prefix_len = integer("prefix_len", prefix_len)
    norm_eps, dropout = number("norm_eps", norm_eps, lowest=0), real("dropout", dropout)
    scale = qkv.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    seed = seed_tensor(seed, qkv.device) if dropout > 0 else None
    weights = [None if weight is None else weight.float() for weight in (q_norm_weight, k_norm_weight)]
    attend = prefix_attention_reference
    if native_enabled():
        refuse_transforms("prefix_attention", qkv=qkv, q_norm_weight=weights[0], k_norm_weight=weights[1], rope=rope)
        attend = torch.ops.alitok.prefix_attention
    return attend(qkv, prefix_len, *weights, norm_eps, rope, scale, dropout, seed)[0]


@without_autocast
def prefix_attention_reference(
    qkv: Tensor,
    prefix_len: int,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
    rope: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, with the (L, L) matrices written out: `out` (B, L, H, D) and log-sum-exp (B, H, L).

    Rounds to the dtype of `qkv` exactly where the contract says so; everything between is float32, or float64
    for float64 inputs.
    """
    dtype, (batch, length, _, heads, _) = qkv.dtype, qkv.shape
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, H, L, D)
    if q_norm_weight is not None:
        q, k = rms_norm(q, q_norm_weight, norm_eps), rms_norm(k, k_norm_weight, norm_eps)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    logits = scale * (q.to(compute) @ k.to(compute).transpose(-1, -2))
    logits = logits.masked_fill(~visible(length, prefix_len, qkv.device), -torch.inf)
    probabilities = logits.softmax(-1)
    if dropout > 0:
        keep, kept = dropout_keep_mask(seed, batch, heads, length, dropout)
        probabilities = probabilities * keep / kept
    out = (probabilities @ v.to(compute)).to(dtype)
    return out.transpose(1, 2).contiguous(), logits.logsumexp(-1)


def visible(length: int, prefix_len: int, device: torch.device | str = "cpu") -> Tensor:
    """(L, L) bool: row i is True where position i sees j."""
    position = torch.arange(length, device=device)
    return (position[None] < prefix_len) | (position[None] <= position[:, None])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, at least in float32, rounded to the dtype of x, then times the weight."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Each interleaved pair of x (..., D) turned by its (cos, sin) in rope (..., D / 2, 2), at least in float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    (even, odd), (cos, sin) = wide.unflatten(-1, (-1, 2)).unbind(-1), rope.to(wide.dtype).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def dropout_keep_mask(seed: Tensor, batch: int, heads: int, length: int, dropout: float) -> tuple[Tensor, float]:
    """(B, H, L, L) bool mask of kept probabilities, and the exact probability of keeping one: `keep_mask` with head
    b * H + h."""
    mask, kept = keep_mask(seed, batch * heads, length, length, dropout)
    return mask.unflatten(0, (batch, heads)), kept


@register_fake("prefix_attention")
def _(qkv, prefix_len, q_norm_weight, k_norm_weight, norm_eps, rope, scale, dropout, seed):
    check_one_device(qkv=qkv, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, rope=rope, seed=seed)
    batch, length, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty((batch, heads, length), dtype=torch.float32)
    return qkv.new_empty((batch, length, heads, head_dim)), lse


@register_fake("prefix_attention_backward")
def _(grad_out, qkv, out, lse, prefix_len, q_norm_weight, k_norm_weight, norm_eps, rope, scale, dropout, seed):
    check_one_device(
        qkv=qkv, grad_out=grad_out, out=out, lse=lse, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight,
        rope=rope, seed=seed,
    )  # fmt: skip
    weights = 0 if q_norm_weight is None else qkv.shape[-1]
    grad_weights = (qkv.new_empty(weights, dtype=torch.float32) for _ in range(2))
    return qkv.new_empty(qkv.shape), *grad_weights


def _save_for_backward(ctx, inputs, output):
    qkv, ctx.prefix_len, q_norm_weight, k_norm_weight, ctx.norm_eps, rope, ctx.scale, ctx.dropout, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, q_norm_weight, k_norm_weight, rope, seed)


def _backward(ctx, grad_out, grad_lse):
    if ctx.needs_input_grad[5]:
        raise RuntimeError(
            "prefix_attention: expected a rope without gradients, got one to differentiate; use_reference() allows it"
        )
    qkv, out, lse, q_norm_weight, k_norm_weight, rope, seed = ctx.saved_tensors
    grad_qkv, *grad_weights = torch.ops.alitok.prefix_attention_backward(
        grad_out, qkv, out, lse, ctx.prefix_len, q_norm_weight, k_norm_weight,
        ctx.norm_eps, rope, ctx.scale, ctx.dropout, seed,
    )  # fmt: skip
    if q_norm_weight is None:
        grad_weights = None, None
    return grad_qkv, None, *grad_weights, None, None, None, None, None


register_autograd("prefix_attention", _backward, _save_for_backward)
differentiated_once("prefix_attention")
