"""Sampling token sequences: guidance schedule, settings, batches (arXiv 2506.05289, section 4)."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alitok_fast.config import GeneratorConfig
from alitok_fast.inference.cuda_graph import Turn
from alitok_fast.inference.loop import SamplingLoop, StepModel, for_steps
from alitok_fast.inference.memory import plan

SEEDS = 2**63


def guidance_schedule(tokens: int, scale: float, power: float) -> Tensor:
    """(tokens,) float32: 1 + (scale - 1) * (1 - cos(pi * (s / tokens)^power)) / 2 for step s."""
    steps = torch.arange(tokens, dtype=torch.float64) / tokens
    return (1 + (scale - 1) * (1 - torch.cos(math.pi * steps**power)) / 2).float()


@dataclass(frozen=True)
class Settings:
    """What decides about an image besides its label, its id and the weights; as the arguments of `sample`."""

    guidance_scale: float
    guidance_power: float
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int


def check_settings(
    config: GeneratorConfig,
    guidance_scale: float | None = None,
    guidance_power: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Settings:
    """The settings with the model's own guidance where None is given.

    Raises TypeError or ValueError naming the setting, what was expected and what came.
    """
    top_k = None if top_k is None else _integer("top_k", top_k)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected None or an integer >= 1, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected None or a number in (0, 1], got {top_p!r}")
    seed = _integer("seed", seed)
    if not -SEEDS <= seed < SEEDS:
        raise ValueError(f"seed: expected an integer in [-2**63, 2**63), got {seed}")
    scale = config.guidance_scale if guidance_scale is None else guidance_scale
    power = config.guidance_power if guidance_power is None else guidance_power
    _check_at_least("guidance_scale", scale, 0)
    _check_at_least("guidance_power", power, 0, strictly=True)
    _check_at_least("temperature", temperature, 0)
    return Settings(scale, power, temperature, top_k, top_p, seed)


class Sampler:
    """`sample`, again and again: the packed weights, the caches and the CUDA graphs stay for the next call.

    Calls from several threads take turns, whatever streams they use; an `on_step` that calls the sampler it is called
    by gets a RuntimeError.

    Args:
        gen: the generator, in evaluation mode, or a `PackedGenerator` or `QuantizedGenerator` made from one. On the CPU
            a generator is packed into a `PackedGenerator` of its own dtype here, and later changes of it count no more.
        kv_dtype: of the key/value cache; None is the model's, torch.float8_e4m3fn stores it in 8 bits (CUDA only).
    """

    def __init__(self, gen: StepModel, kv_dtype: torch.dtype | None = None) -> None:
        self.model = for_steps(gen)
        self.kv_dtype = kv_dtype
        self._loops: OrderedDict[tuple, SamplingLoop] = OrderedDict()
        # On a GPU a loop holds its graph, on a CPU nothing that is slow to make again.
        self._kept = 4 if self.model.device.type == "cuda" else 1
        self._turn = Turn(self.model.device)  # of all loops

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor | Sequence[int],
        *,
        image_ids: Tensor | Sequence[int] | None = None,
        prompt_tokens: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
        **settings: Any,
    ) -> Tensor:
        """As `sample`; `settings` are those of `check_settings`."""
        config, device = self.model.config, self.model.device
        labels = _as_ids("labels", labels, device)
        count = len(labels)
        image_ids = torch.arange(count, device=device) if image_ids is None else _as_ids("image_ids", image_ids, device)
        if image_ids.shape != labels.shape:
            raise ValueError(f"image_ids: expected shape {tuple(labels.shape)}, got {tuple(image_ids.shape)}")
        if self.model.training:
            raise ValueError("gen: expected evaluation mode, got training mode; call gen.eval()")
        chosen = check_settings(config, **settings)
        if prompt_tokens is not None:
            prompt_tokens = _check_prompt(prompt_tokens, count, config, device)
        guided = chosen.guidance_scale != 0
        rule = guided, chosen.temperature, chosen.top_k, chosen.top_p
        schedule = (
            guidance_schedule(config.num_tokens, chosen.guidance_scale, chosen.guidance_power) if guided else None
        )
        drawn = []
        with self._turn:
            size = self._most_together(count, rule)
            for begin in range(0, count, size):
                part = slice(begin, begin + size)
                prompt = None if prompt_tokens is None else prompt_tokens[part]
                loop = self._loop(len(labels[part]), *rule)
                drawn.append(loop.draw(labels[part], schedule, chosen.seed, image_ids[part], prompt, on_step))
        tokens = torch.cat(drawn)
        _check_drawn(tokens)
        return tokens

    def loop(
        self,
        batch_size: int,
        guided: bool,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> SamplingLoop:
        """The loop that draws such batches: one kept from before, or a new one. Raises MemoryError."""
        with self._turn:
            return self._loop(batch_size, guided, temperature, top_k, top_p)

    def _loop(self, *key: Any) -> SamplingLoop:
        if key not in self._loops:
            self._make_room(*key[:2])
            while len(self._loops) >= self._kept:
                self._loops.popitem(last=False)
            self._loops[key] = SamplingLoop(self.model, *key, self.kv_dtype, self._turn)
        self._loops.move_to_end(key)
        return self._loops[key]

    def _most_together(self, count: int, rule: tuple) -> int:
        """How many of `count` images are drawn at a time."""
        if (count, *rule) in self._loops:
            return count
        self._make_room(count, rule[0])
        return min(count, max(1, self._fits(rule[0])))

    def _make_room(self, batch_size: int, guided: bool) -> None:
        """Loops of before give way where memory is short."""
        while self._loops and self._fits(guided) < batch_size:
            self._loops.popitem(last=False)

    def _fits(self, guided: bool) -> int:
        return plan(self.model, guided=guided, kv_dtype=self.kv_dtype).largest_batch


def sample(
    gen: StepModel,
    labels: Tensor | Sequence[int],
    guidance_scale: float | None = None,
    guidance_power: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    *,
    image_ids: Tensor | Sequence[int] | None = None,
    prompt_tokens: Tensor | None = None,
    kv_dtype: torch.dtype | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw one token sequence per label: (B, N) int64 in [0, codebook_size).

    An image depends on (seed, its image id, its label, the settings) alone, not on the batch it is drawn in.

    Args:
        gen: the generator, in evaluation mode, or a `PackedGenerator` or `QuantizedGenerator` made from one. On the CPU
            a generator is packed for the length of the call: whoever samples more than once makes a `Sampler`.
        labels: (B,) classes in [0, classes).
        guidance_scale: >= 0; 0 switches guidance off and halves the work. None takes the preset's value.
        guidance_power: > 0, exponent of the schedule. None takes the preset's value.
        temperature: >= 0; 0 takes the largest logit.
        top_k: keep the k largest logits; None keeps all.
        top_p: keep the smallest set with this mass, in (0, 1]; None keeps all.
        seed: key of the noise, an integer in [-2**63, 2**63).
        image_ids: (B,) ids keying each image's noise; None takes 0..B-1.
        prompt_tokens: (B, n <= N) int64, tokens to keep; the image is completed from there. None starts from nothing.
        kv_dtype: of the key/value cache; None is the model's, torch.float8_e4m3fn stores it in 8 bits (CUDA only).
        on_step: called as on_step(step, tokens so far (B, step + 1)) after each token. A batch that does not fit in
            memory (`plan`) is drawn in parts, in the order of its images: then B is the part's, and each part begins
            with step 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: the logits became NaN or infinite.
        MemoryError: not even one image fits.
    """
    return Sampler(gen, kv_dtype)(
        labels,
        image_ids=image_ids,
        prompt_tokens=prompt_tokens,
        on_step=on_step,
        guidance_scale=guidance_scale,
        guidance_power=guidance_power,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def _as_ids(name: str, value: Tensor | Sequence[int], device: torch.device) -> Tensor:
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected integers of shape (B,), got {value!r}") from None
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"{name}: expected shape (B,) with B >= 1, got {tuple(ids.shape)}")
    if ids.dtype == torch.bool or ids.is_floating_point():
        raise TypeError(f"{name}: expected integers, got {str(ids.dtype).removeprefix('torch.')}")
    return ids.to(device, torch.int64)


def _check_at_least(name: str, value: float, low: float, strictly: bool = False) -> None:
    if not math.isfinite(value) or value < low or (strictly and value == low):
        raise ValueError(f"{name}: expected a finite number {'>' if strictly else '>='} {low:g}, got {value!r}")


def _check_prompt(prompt: Tensor, batch_size: int, config: GeneratorConfig, device: torch.device) -> Tensor:
    if isinstance(prompt, np.ndarray | Sequence):
        prompt = torch.as_tensor(prompt)
    if not isinstance(prompt, Tensor):
        raise TypeError(f"prompt_tokens: expected a tensor, got {type(prompt).__name__}")
    if prompt.ndim != 2 or len(prompt) != batch_size or prompt.shape[1] > config.num_tokens:
        raise ValueError(
            f"prompt_tokens: expected shape ({batch_size}, n <= {config.num_tokens}), got {tuple(prompt.shape)}"
        )
    if prompt.dtype != torch.int64:
        raise TypeError(f"prompt_tokens: expected int64, got {str(prompt.dtype).removeprefix('torch.')}")
    if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < config.codebook_size:
        raise ValueError(
            f"prompt_tokens: expected values in [0, {config.codebook_size}), "
            f"got {int(prompt.min())}..{int(prompt.max())}"
        )
    return prompt.to(device)


def _check_drawn(tokens: Tensor) -> None:
    bad = (tokens < 0).any(1).nonzero().flatten()
    if len(bad):
        step = int((tokens[bad[0]] < 0).nonzero()[0])
        raise RuntimeError(
            f"sampling: expected finite logits, got NaN or infinity in image {int(bad[0])} at step {step}; "
            "the weights or the precision are at fault"
        )
