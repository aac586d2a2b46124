"""Attention with one mask for the whole system: position i sees j when j < prefix_len or j <= i."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast._library import native_enabled, register_autograd, register_fake
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
    """Softmax attention over packed queries, keys and values (design: AliTok, arXiv 2506.05289, section 3).

    `prefix_len` 0 is causal attention, `prefix_len` L is bidirectional, between them a prefix language model.

    Args:
        qkv: (B, L, 3, H, D), float32, bfloat16 or float16; D a multiple of 8 up to 128, L up to 4,194,240.
        prefix_len: 0..L, the keys that every position sees.
        q_norm_weight, k_norm_weight: (D,), both or neither: RMSNorm over D on queries and keys, computed in
            float32, rounded to the dtype of `qkv`, then multiplied by the weight in that dtype.
        norm_eps: added to the mean square.
        rope: (L, D / 2, 2) float32, (cos, sin) of each interleaved pair (x0, x1) -> (x0 c - x1 s, x0 s + x1 c),
            applied after the norm. A row of zeros makes that position's query and key zero vectors.
        scale: factor on the logits, default D ** -0.5.
        dropout: probability in [0, 1), rounded to a multiple of 2**-16, of dropping an attention probability.
        seed: int, or int64 tensor of one element on the device of `qkv`: key of the dropout mask, see
            `dropout_keep_mask`. None draws one from torch's default generator.

    Returns:
        (B, L, H, D) in the dtype of `qkv`, also under autocast. Sums and softmax are float32. Differentiable in `qkv`
        and the norm weights; the gradients are the same in every run and for every number of threads.

    Raises:
        ValueError: for dtypes, shapes, devices or values that do not fit.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    seed = seed_tensor(seed, qkv.device) if dropout > 0 else None
    weights = [None if weight is None else weight.float() for weight in (q_norm_weight, k_norm_weight)]
    attend = torch.ops.alitok.prefix_attention if native_enabled() else prefix_attention_reference
    return attend(qkv, prefix_len, *weights, norm_eps, rope, scale, dropout, seed)[0]


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
    with torch.autocast(qkv.device.type, enabled=False):
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
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
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
    batch, length, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty((batch, heads, length), dtype=torch.float32)
    return qkv.new_empty((batch, length, heads, head_dim)), lse


@register_fake("prefix_attention_backward")
def _(grad_out, qkv, out, lse, prefix_len, q_norm_weight, k_norm_weight, *rest):
    weights = 0 if q_norm_weight is None else qkv.shape[-1]
    grad_weights = (qkv.new_empty(weights, dtype=torch.float32) for _ in range(2))
    return qkv.new_empty(qkv.shape), *grad_weights


def _save_for_backward(ctx, inputs, output):
    qkv, ctx.prefix_len, q_norm_weight, k_norm_weight, ctx.norm_eps, rope, ctx.scale, ctx.dropout, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, q_norm_weight, k_norm_weight, rope, seed)


def _backward(ctx, grad_out, grad_lse):
    qkv, out, lse, q_norm_weight, k_norm_weight, rope, seed = ctx.saved_tensors
    grad_qkv, *grad_weights = torch.ops.alitok.prefix_attention_backward(
        grad_out, qkv, out, lse, ctx.prefix_len, q_norm_weight, k_norm_weight,
        ctx.norm_eps, rope, ctx.scale, ctx.dropout, seed,
    )  # fmt: skip
    if q_norm_weight is None:
        grad_weights = None, None
    return grad_qkv, None, *grad_weights, None, None, None, None, None


register_autograd("prefix_attention", _backward, _save_for_backward)
