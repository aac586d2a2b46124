"""One token per image, sampled from its logits: guidance, temperature, top-k, top-p and counter-based noise."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast._library import native_enabled, register_fake
from alitok_fast.ops.arguments import (
    LARGEST_FLOAT32,
    check_one_device,
    check_tensors,
    integer,
    number,
    real,
    without_autocast,
)
from alitok_fast.ops.philox import DOMAIN_SAMPLE, philox4x32, split64


def sample_tokens(
    logits: Tensor,
    *,
    guidance_scale: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    seed: Tensor | int,
    image_ids: Tensor,
    step: Tensor | int,
) -> Tensor:
    """Sample one code per image.

    The sample is argmax over k of logit_k + temperature * g_k with Gumbel noise g (the Gumbel-max trick), which has the
    distribution softmax(logits / temperature). The noise depends on (seed, image id, step, k) alone: an image is the
    same in any batch, any split of a batch, and on any number of devices.

    Guidance comes first, then top-k, then top-p, then the sample. Equal logits are never told apart by top-k or top-p:
    all codes that equal the last one kept are kept. A logit of -inf is a code that is never sampled; with guidance it
    suffices that one of the two rows says so.

    Source: classifier-free guidance as in AliTok's sampling (arXiv 2506.05289, section 4); the noise is Philox4x32-10
    (see `alitok_fast.ops.philox`).

    Devices: CPU and CUDA. Tensors lie on the device of `logits`. Nothing is copied to the host, so that a captured CUDA
    graph samples anew when any of them changes in place. Autocast changes nothing.

    Each setting is a number for all images, or a tensor of shape () or (B,).

    Gradients: none; the result is an integer. `torch.vmap` runs the operator once per element, whose noise is the same
    where seed, image id and step are.

    Args:
        logits: (B, K) float32, bfloat16 or float16, K in 1..2**30; with guidance (2 B, K): B conditional rows c, then B
            unconditional rows u. Computed in float32.
        guidance_scale: s in u + (c - u) * s: a finite number that float32 holds, or a float32 tensor. None is no
            guidance.
        temperature: 0, or a number in 1e-30..1e30; a tensor is float32. 0 is greedy: the largest logit, the lowest
            index on a tie, no noise.
        top_k: >= 1, keep the k largest logits. None keeps all, as does 0 in an int64 tensor.
        top_p: in (0, 1], keep the smallest set of codes, largest first, whose probability (at this temperature, among
            what top-k kept) reaches top_p. None keeps all; a tensor is float64.
        seed: int in the range of int64, or an int64 tensor.
        image_ids: (B,) int64, any value.
        step: int in [0, 2**32), or an int64 tensor, of which the low 32 bits count.

    Returns:
        (B,) int64 in [0, K). -1 stands for a row that is no distribution: one with NaN or +inf after guidance, or with
        nothing but -inf; on CUDA also for an image with a setting out of range. Looking for such rows here would stop
        a CUDA stream; whoever reads the ids back checks them.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for shapes, dtypes, devices or values that do not fit. The message names the argument, what was
            expected and what was given.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    check_tensors(logits=logits, image_ids=image_ids)
    if guidance_scale is not None and not isinstance(guidance_scale, Tensor):
        guidance_scale = number("guidance_scale", guidance_scale)
        if abs(guidance_scale) > LARGEST_FLOAT32:
            raise ValueError(f"guidance_scale: expected a number that float32 holds, got {guidance_scale}")
        guidance_scale = _filled(guidance_scale, torch.float32, logits.device)
    if not isinstance(temperature, Tensor):
        temperature = real("temperature", temperature)
        if temperature != 0 and not 1e-30 <= temperature <= 1e30:
            raise ValueError(f"temperature: expected 0 (greedy) or a number in 1e-30..1e30, got {temperature:g}")
        temperature = _filled(temperature, torch.float32, logits.device)
    if not isinstance(top_k, Tensor):
        if top_k is not None and integer("top_k", top_k) < 1:
            raise ValueError(f"top_k: expected None or a number >= 1, got {top_k}")
        top_k = _filled(0 if top_k is None else integer("top_k", top_k), torch.int64, logits.device)
    if not isinstance(top_p, Tensor):
        top_p = 1.0 if top_p is None else real("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected None or a number in (0, 1], got {top_p:g}")
        top_p = _filled(top_p, torch.float64, logits.device)
    if not isinstance(seed, Tensor):
        seed = _filled(integer("seed", seed), torch.int64, logits.device)
    if not isinstance(step, Tensor):
        step = _filled(integer("step", step, 0, 2**32 - 1), torch.int64, logits.device)
    operator = torch.ops.alitok.sample_tokens if native_enabled() else sample_tokens_reference
    return operator(logits, guidance_scale, temperature, top_k, top_p, seed, image_ids, step)


@register_fake("sample_tokens")
def _(logits, guidance_scale, temperature, top_k, top_p, seed, image_ids, step):
    check_one_device(
        logits=logits, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        image_ids=image_ids, step=step,
    )  # fmt: skip
    return torch.empty_like(image_ids, memory_format=torch.contiguous_format)


def _filled(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A fill is a kernel argument: unlike torch.tensor it copies nothing from the host, and can be captured.
    return torch.full((), value, dtype=dtype, device=device)


@without_autocast
def sample_tokens_reference(
    logits: Tensor,
    guidance_scale: Tensor | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    image_ids: Tensor,
    step: Tensor,
) -> Tensor:
    """The definition of `sample_tokens`."""
    x = guided_logits(logits, guidance_scale)
    largest = x.amax(-1)
    valid = (largest > -torch.inf) & (largest < torch.inf)  # both are False for NaN, which amax passes on
    temperature, top_k, top_p, seed, step = (
        setting.expand(len(x))[:, None] for setting in (temperature, top_k, top_p, seed, step)
    )
    valid &= ((temperature == 0) | ((temperature >= 1e-30) & (temperature <= 1e30)) & (top_k >= 0)).squeeze(1)
    valid &= ((top_p > 0) & (top_p <= 1)).squeeze(1)
    noisy = kept_logits(x, temperature, top_k, top_p) + temperature * gumbel_noise(seed, image_ids, step, x.shape[-1])
    return torch.where(valid, torch.where(temperature > 0, noisy, x).argmax(-1), -1)


def guided_logits(logits: Tensor, guidance_scale: Tensor | None) -> Tensor:
    """u + (c - u) * s in float32, (B, K); -inf where either row is -inf, in which the formula would give NaN."""
    if guidance_scale is None:
        return logits.float()
    conditional, unconditional = logits.float().chunk(2)
    x = unconditional + (conditional - unconditional) * guidance_scale.reshape(-1, 1)
    # The sum is -inf for a masked code, but NaN if the other row is NaN or +inf, which must not be hidden.
    return torch.where(conditional + unconditional == -torch.inf, -torch.inf, x)


def kept_logits(x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """`x` (B, K) with -inf for every code that top-k, then top-p leave out; the settings are (B, 1)."""
    codes = x.shape[-1]
    ordered = x.sort(descending=True).values
    last = torch.where((top_k > 0) & (top_k < codes), top_k, codes) - 1
    x = x.masked_fill(x < ordered.gather(-1, last), -torch.inf)
    ordered = x.sort(descending=True).values
    mass = (ordered.double() / temperature).softmax(-1).cumsum(-1)
    last = torch.where(top_p < 1, (mass < top_p).sum(-1, keepdim=True).clamp(max=codes - 1), codes - 1)
    return x.masked_fill(x < ordered.gather(-1, last), -torch.inf)


def gumbel_noise(
    seed: Tensor, image_ids: Tensor, step: Tensor, codes: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, codes) standard Gumbel noise: -log(-log(u)); seed and step are () or (B, 1).

    Code k takes word k % 4 of the counter (k // 4, step, image id low, image id high). A word r gives
    1 - u = (r + 1/2) / 2**32, which is rounded to float32; u itself is formed only inside log1p. The noise is large
    where u is near 1, and 1 - u has 24 significant bits there, down to 2**-33. u is at least 2**-24.
    """
    low, high = split64(image_ids[:, None])
    block = torch.arange(-(-codes // 4), device=image_ids.device) | DOMAIN_SAMPLE
    words = torch.stack(philox4x32(seed, block, split64(step)[0], low, high), -1).flatten(1)[:, :codes]
    complement = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).to(dtype)
    return -torch.log(-torch.log1p(-complement))
