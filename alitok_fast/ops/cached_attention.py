"""Attention of one new position over a static key/value cache: `prefix_attention` for the sampling loop."""

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
    position: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    rope: Tensor | None = None,
    scale: float | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Append one position to each row's cache, and attend from it to all positions so far.

    The result equals position `position` of `prefix_attention(..., prefix_len=0)` over the whole sequence. Nothing is
    copied to the host: `position` lies on the device, so that one captured CUDA graph serves every step.

    Source: the generator's causal attention (AliTok, arXiv 2506.05289, section 3), one step at a time.

    Devices: CPU and CUDA. The dtype of the result is that of `qkv`, also under autocast.

    Gradients: none. Arguments that require one are refused unless gradients are off (`torch.no_grad()`), as are
    forward-mode derivatives; `prefix_attention` has gradients. `torch.vmap` refuses the operator, because it writes its
    cache in place; a vmapped dimension belongs into R.

    Args:
        qkv: (R, 3, H, D) float32, bfloat16 or float16, contiguous: query, key and value of the new position of R
            sequences; D a multiple of 8 up to 128.
        keys: (R, H, N, D), N up to 16,384, in the dtype of `qkv` or float8_e4m3fn; `position` is written in place.
            Keys are stored normalised and rotated; float8_e4m3fn rounds them, saturating at 448.
        values: as `keys`, with the same dtype and strides.
        position: one int64 element on the device of `qkv`, in [0, N). Outside that range nothing is written and the
            result is NaN, because only the device knows the value.
        q_norm_weight: (D,) floating point, or None: RMSNorm of the query, as in `prefix_attention`.
        k_norm_weight: (D,), the same for the key; given exactly where `q_norm_weight` is.
        norm_eps: a number >= 0, added to the mean square.
        rope: (>= N, D / 2, 2) float32, (cos, sin) of each position, of which row `position` is used; or None.
        scale: finite factor on the logits; None is D ** -0.5.
        arrivals: (R * H,) int32 zeros on the device of `qkv`, which are zeros again afterwards, or None. With them CUDA
            shares the keys of few rows among several blocks, which count here how many have finished; calls that may
            run at the same time need their own. Without them each row and head has one block. The CPU ignores them.

    Returns:
        (R, H, D) in the dtype of `qkv`. Sums and softmax are float32.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for shapes, dtypes, strides, devices or values that do not fit. The message names the argument, what
            was expected and what was given.
        RuntimeError: where a derivative is asked for.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    check_tensors(qkv=qkv, keys=keys, values=values, position=position)
    check_optional_tensors(q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, rope=rope, arrivals=arrivals)
    if qkv.ndim != 4:
        raise ValueError(f"qkv: expected 4 dimensions, got shape {tuple(qkv.shape)}")
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
    return operator(qkv, keys, values, position, q_norm_weight, k_norm_weight, norm_eps, rope, scale, arrivals)


@without_autocast
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
    if q_norm_weight is not None and k_norm_weight is not None:
        q, k = rms_norm(q, q_norm_weight, norm_eps), rms_norm(k, k_norm_weight, norm_eps)
    if rope is not None:
        q, k = rotate(q, rope[row]), rotate(k, rope[row])
    _store(keys, row, k)
    _store(values, row, v)
    compute = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    seen = torch.arange(keys.shape[2], device=qkv.device) <= row
    # Later positions are uninitialised, and may be NaN. They are replaced, since 0 * NaN is NaN.
    stored_keys = torch.where(seen[:, None], keys.to(compute), 0)
    stored_values = torch.where(seen[:, None], values.to(compute), 0)
    logits = scale * (q.to(compute) @ stored_keys.transpose(-1, -2))
    probabilities = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (probabilities @ stored_values).squeeze(2).to(qkv.dtype)


def _store(cache: Tensor, row: Tensor, x: Tensor) -> None:
    if cache.dtype == torch.float8_e4m3fn:
        # Copied as bytes, because index_copy_ does not know the dtype.
        cache, x = cache.view(torch.uint8), x.clamp(-E4M3_MAX, E4M3_MAX).to(cache.dtype).view(torch.uint8)
    cache.index_copy_(2, row, x.to(cache.dtype))


@register_fake("cached_attention")
def _(qkv, keys, values, position, q_norm_weight, k_norm_weight, norm_eps, rope, scale, arrivals):
    check_one_device(
        qkv=qkv, keys=keys, values=values, position=position, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight,
        rope=rope, arrivals=arrivals,
    )  # fmt: skip
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
