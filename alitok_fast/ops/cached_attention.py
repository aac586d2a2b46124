"""Attention of one new position over a static key/value cache: the sampling loop's half of `prefix_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast._library import native_enabled, register_fake
from alitok_fast.ops.prefix_attention import rms_norm, rotate

E4M3_MAX = 448.0


def cached_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    rope: Tensor | None = None,
    scale: float | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Append one position to each row's cache and attend from it to all positions so far.

    Equals position `position` of `prefix_attention(..., prefix_len=0)` over the whole sequence. Nothing is copied to
    the host: `position` lives on the device, so that one captured CUDA graph serves every step.

    Args:
        qkv: (R, 3, H, D) float32, bfloat16 or float16, contiguous: the new position of R sequences; D a multiple of 8
            up to 128.
        keys, values: (R, H, N, D), N up to 16384, written at `position` in place. The dtype of `qkv`, or float8_e4m3fn,
            to which keys and values are rounded, saturating at 448. Keys are stored normalised and rotated.
        position: one int64 element on the device of `qkv`, in [0, N). Outside, nothing is written and the result is
            NaN: the range is known on the device alone.
        q_norm_weight, k_norm_weight: (D,), both or neither, RMSNorm as in `prefix_attention`.
        norm_eps: added to the mean square.
        rope: (>= N, D / 2, 2) float32, (cos, sin) of each position; row `position` is used.
        scale: factor on the logits, default D ** -0.5.
        arrivals: (R * H,) int32 zeros on the device of `qkv`, which are zeros again afterwards. With them CUDA shares
            the keys of few rows among several blocks, which count here how many have finished; calls that may run at
            the same time need their own. None is one block for each row and head. The CPU ignores them.

    Returns:
        (R, H, D) in the dtype of `qkv`. Sums and softmax are float32.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what was expected and what was given.
    """
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if q_norm_weight is not None and k_norm_weight is not None:
        q_norm_weight, k_norm_weight = q_norm_weight.float(), k_norm_weight.float()
    operator = torch.ops.alitok.cached_attention if native_enabled() else cached_attention_reference
    return operator(qkv, keys, values, position, q_norm_weight, k_norm_weight, norm_eps, rope, scale, arrivals)


def cached_attention_reference(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
    rope: Tensor | None,
    scale: float,
    arrivals: Tensor | None = None,
) -> Tensor:
    """The definition of `cached_attention`."""
    if not 0 <= int(position) < keys.shape[2]:
        return qkv.new_full((qkv.shape[0], *qkv.shape[2:]), torch.nan)
    q, k, v = qkv.unsqueeze(3).unbind(1)  # (R, H, 1, D)
    row = position.reshape(1)
    if q_norm_weight is not None:
        q, k = rms_norm(q, q_norm_weight, norm_eps), rms_norm(k, k_norm_weight, norm_eps)
    if rope is not None:
        q, k = rotate(q, rope[row]), rotate(k, rope[row])
    _store(keys, row, k)
    _store(values, row, v)
    compute = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    seen = torch.arange(keys.shape[2], device=qkv.device) <= row
    # Positions behind this one are uninitialised, maybe NaN: replaced, since 0 * NaN is NaN.
    stored_keys = torch.where(seen[:, None], keys.to(compute), 0)
    stored_values = torch.where(seen[:, None], values.to(compute), 0)
    logits = scale * (q.to(compute) @ stored_keys.transpose(-1, -2))
    probabilities = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (probabilities @ stored_values).squeeze(2).to(qkv.dtype)


def _store(cache: Tensor, row: Tensor, x: Tensor) -> None:
    if cache.dtype == torch.float8_e4m3fn:
        # As bytes: index_copy_ does not know the type.
        cache, x = cache.view(torch.uint8), x.clamp(-E4M3_MAX, E4M3_MAX).to(cache.dtype).view(torch.uint8)
    cache.index_copy_(2, row, x.to(cache.dtype))


@register_fake("cached_attention")
def _(qkv, keys, values, position, q_norm_weight, k_norm_weight, norm_eps, rope, scale, arrivals):
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
