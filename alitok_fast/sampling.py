"""Sampling token sequences: guidance schedule and the cached loop (arXiv 2506.05289, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alitok_fast.models.generator import Generator
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.ops.sample_tokens import sample_tokens


def guidance_schedule(tokens: int, scale: float, power: float) -> Tensor:
    """(tokens,) float32: 1 + (scale - 1) * (1 - cos(pi * (s / tokens)^power)) / 2 for step s."""
    steps = torch.arange(tokens, dtype=torch.float64) / tokens
    return (1 + (scale - 1) * (1 - torch.cos(math.pi * steps**power)) / 2).float()


@torch.inference_mode()
def sample(
    gen: Generator,
    labels: Tensor | Sequence[int],
    guidance_scale: float | None = None,
    guidance_power: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    image_ids: Tensor | Sequence[int] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw one token sequence per label: (B, N) int64 in [0, codebook_size).

    An image depends on (seed, its image id, its label, the settings) alone, not on the batch it is drawn in.

    Args:
        gen: the generator, in evaluation mode.
        labels: (B,) classes in [0, classes).
        guidance_scale: >= 0; 0 switches guidance off and halves the work. None takes the preset's value.
        guidance_power: > 0, exponent of the schedule. None takes the preset's value.
        temperature: >= 0; 0 takes the largest logit.
        top_k: keep the k largest logits; None keeps all.
        top_p: keep the smallest set with this mass, in (0, 1]; None keeps all.
        seed: key of the noise.
        image_ids: (B,) ids keying each image's noise; None takes 0..B-1.
        on_step: called as on_step(step, tokens so far (B, step + 1)) after each token.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: the logits became NaN or infinite.
    """
    config, device = gen.config, gen.device
    labels = _as_ids("labels", labels, device)
    image_ids = (
        torch.arange(len(labels), device=device) if image_ids is None else _as_ids("image_ids", image_ids, device)
    )
    if image_ids.shape != labels.shape:
        raise ValueError(f"image_ids: expected shape {tuple(labels.shape)}, got {tuple(image_ids.shape)}")
    if gen.training:
        raise ValueError("gen: expected evaluation mode, got training mode; call gen.eval()")
    scale = config.guidance_scale if guidance_scale is None else guidance_scale
    power = config.guidance_power if guidance_power is None else guidance_power
    _check_at_least("guidance_scale", scale, 0)
    _check_at_least("guidance_power", power, 0, strictly=True)
    _check_at_least("temperature", temperature, 0)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected None or an integer >= 1, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected None or a number in (0, 1], got {top_p!r}")

    guided = scale != 0
    schedule = guidance_schedule(config.tokens, scale, power).to(device) if guided else None
    condition = gen.condition_ids(labels, len(labels))
    if guided:
        condition = torch.cat([condition, gen.condition_ids(None, len(labels))])
    cache = KVCache(config, len(condition), device, gen.dtype)
    tokens = torch.empty(len(labels), config.tokens, dtype=torch.int64, device=device)
    ids = condition.unsqueeze(1)
    for step in range(config.tokens):
        tokens[:, step] = sample_tokens(
            gen.extend(ids, cache),
            guidance_scale=schedule[step] if guided else None,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            image_ids=image_ids,
            step=step,
        )
        # A row without a distribution is marked -1; it is reported at the end, so that no step waits for the device.
        ids = tokens[:, step : step + 1].clamp(min=0).repeat(2 if guided else 1, 1)
        if on_step is not None:
            on_step(step, tokens[:, : step + 1])
    _check_drawn(tokens)
    return tokens


def _as_ids(name: str, value: Tensor | Sequence[int], device: torch.device) -> Tensor:
    ids = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if ids.dtype == torch.bool or ids.is_floating_point() and len(ids):
        raise TypeError(f"{name}: expected integers, got {str(ids.dtype).removeprefix('torch.')}")
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"{name}: expected shape (B,) with B >= 1, got {tuple(ids.shape)}")
    return ids.to(device, torch.int64)


def _check_at_least(name: str, value: float, low: float, strictly: bool = False) -> None:
    if not math.isfinite(value) or value < low or (strictly and value == low):
        raise ValueError(f"{name}: expected a finite number {'>' if strictly else '>='} {low:g}, got {value!r}")


def _check_drawn(tokens: Tensor) -> None:
    bad = (tokens < 0).any(1).nonzero().flatten()
    if len(bad):
        step = int((tokens[bad[0]] < 0).nonzero()[0])
        raise RuntimeError(
            f"sampling: expected finite logits, got NaN or infinity in image {int(bad[0])} at step {step}; "
            "the weights or the precision are at fault"
        )
