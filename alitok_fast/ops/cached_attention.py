"""Attention of new positions over a static key/value cache: `prefix_attention` for the sampling loop."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast._library import native_enabled, register_fake
from alitok_fast.ops.arguments import (
    check_one_device,
    check_optional_tensors,
    check_tensors,
    number,
    without_autocast,
)
from alitok_fast.ops.derivatives import refuse_gradients, refuse_transforms
from alitok_fast.ops.prefix_attention import rms_norm, rotate

E4M3_MAX = 448.0


def cached_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    slots: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    rope: Tensor | None = None,
    scale: float | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Append W positions to each row's cache, and attend from each of them to itself and all before.

    The result equals the rows' positions of `prefix_attention(..., prefix_len=0)` over whole sequences, and the bits of
    a position depend neither on W, nor on other rows, nor on the slot. Nothing is copied to the host: positions lie on
    the device, so that one captured CUDA graph serves every step.

    Source: the generator's causal attention (AliTok, arXiv 2506.05289, section 3), one pass at a time.

    Devices: CPU and CUDA. The dtype of the result is that of `qkv`, also under autocast.

    Gradients: none. Arguments that require one are refused unless gradients are off (`torch.no_grad()`), as are
    forward-mode derivatives; `prefix_attention` has gradients. `torch.vmap` refuses the operator, because it writes its
    cache in place; a vmapped dimension belongs into R.

    Args:
        qkv: (R, W, 3, H, D) float32, bfloat16 or float16, contiguous: query, key and value of W consecutive new
            positions of R sequences; D a multiple of 8 up to 128.
        keys: (S, H, N, D), S sequences, N up to 16,384, in the dtype of `qkv` or float8_e4m3fn; the new positions are
            written in place. Keys are stored normalised and rotated; float8_e4m3fn rounds them, saturating at 448.
        values: as `keys`, with the same dtype and strides.
        positions: (R,) int64 on the device of `qkv`, where the first new position of each row is, in [0, N). Outside
            that range, such as at -1, the row rests: nothing is written and the result is NaN, because only the device
            knows the value. So it is for columns behind N - 1.
        slots: (R,) int64, the sequence of each row in [0, S), another for each; None: row r has sequence r. Outside
            that range the row rests.
        q_norm_weight: (D,) floating point, or None: RMSNorm of the query, as in `prefix_attention`.
        k_norm_weight: (D,), the same for the key; given exactly where `q_norm_weight` is.
        norm_eps: a number >= 0, added to the mean square.
        rope: (>= N, D / 2, 2) float32, (cos, sin) of each position; or None.
        scale: finite factor on the logits; None is D ** -0.5.
        arrivals: (R * W * H,) int32 zeros on the device of `qkv`, which are zeros again afterwards, or None. With them
            CUDA shares the keys of few rows among several blocks, which count here how many have finished; calls that
            may run at the same time need their own. Without them each position and head has one block. The CPU ignores
            them.

    Returns:
        (R, W, H, D) in the dtype of `qkv`. Sums and softmax are float32.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for shapes, dtypes, strides, devices or values that do not fit. The message names the argument, what
            was expected and what was given.
        RuntimeError: where a derivative is asked for.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    check_tensors(qkv=qkv, keys=keys, values=values, positions=positions)
    check_optional_tensors(
        slots=slots, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, rope=rope, arrivals=arrivals
    )
    if qkv.ndim != 5:
        raise ValueError(f"qkv: expected 5 dimensions, got shape {tuple(qkv.shape)}")
    norm_eps = number("norm_eps", norm_eps, lowest=0)
    scale = qkv.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    if q_norm_weight is not None and k_norm_weight is not None:
        q_norm_weight, k_norm_weight = q_norm_weight.float(), k_norm_weight.float()
    operator = cached_attention_reference
    if native_enabled():
        inputs = {"qkv": qkv, "keys": keys, "values": values, "q_norm_weight": q_norm_weight,
                  "k_norm_weight": k_norm_weight, "rope": rope}  # fmt: skip
        refuse_gradients("cached_attention", "prefix_attention has gradients", **inputs)
        refuse_transforms("cached_attention", "prefix_attention has gradients", **inputs)
        operator = torch.ops.alitok.cached_attention
    return operator(qkv, keys, values, positions, slots, q_norm_weight, k_norm_weight, norm_eps, rope, scale, arrivals)


@without_autocast
def cached_attention_reference(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
    rope: Tensor | None,
    scale: float,
    arrivals: Tensor | None = None,
) -> Tensor:
    """The definition of `cached_attention`."""
    slots = torch.arange(len(qkv), device=qkv.device) if slots is None else slots
    inside = (positions >= 0) & (positions < keys.shape[2]) & (slots >= 0) & (slots < len(keys))
    out = torch.full_like(qkv[:, :, 0], torch.nan)
    for column in range(qkv.shape[1]):
        rows = (inside & (positions < keys.shape[2] - column)).nonzero().flatten()
        q, k, v = qkv[rows, column].unbind(1)  # (rows, H, D)
        at, slot = positions[rows] + column, slots[rows]
        if q_norm_weight is not None and k_norm_weight is not None:
            q, k = rms_norm(q, q_norm_weight, norm_eps), rms_norm(k, k_norm_weight, norm_eps)
        if rope is not None:
            q, k = (rotate(x.unsqueeze(2), rope[at, None, None]).squeeze(2) for x in (q, k))
        _store(keys, slot, at, k)
        _store(values, slot, at, v)
        out[rows, column] = attended_values(q, keys[slot], values[slot], at, scale).to(qkv.dtype)
    return out


def attended_values(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """(R, H, D): of queries (R, H, D) over keys and values (R, H, N, D) up to the positions (R,)."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    seen = (torch.arange(keys.shape[2], device=q.device) <= positions[:, None])[:, None, :, None]  # (R, 1, N, 1)
    # Later positions are uninitialised, and may be NaN. They are replaced, since 0 * NaN is NaN.
    stored_keys, stored_values = (torch.where(seen, part.to(compute), 0) for part in (keys, values))
    logits = scale * (stored_keys @ q.to(compute).unsqueeze(-1))
    probabilities = logits.masked_fill(~seen, -torch.inf).softmax(2)
    return (probabilities.transpose(2, 3) @ stored_values).squeeze(2)


def _store(cache: Tensor, slots: Tensor, positions: Tensor, x: Tensor) -> None:
    if cache.dtype == torch.float8_e4m3fn:
        # Written as bytes, because index_put_ does not know the dtype.
        cache, x = cache.view(torch.uint8), x.clamp(-E4M3_MAX, E4M3_MAX).to(cache.dtype).view(torch.uint8)
    cache[slots, :, positions] = x.to(cache.dtype)


@register_fake("cached_attention")
def _(qkv, keys, values, positions, slots, q_norm_weight, k_norm_weight, norm_eps, rope, scale, arrivals):
    check_one_device(
        qkv=qkv, keys=keys, values=values, positions=positions, slots=slots, q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight, rope=rope, arrivals=arrivals,
    )  # fmt: skip
    return qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:])
