"""Sampling token sequences: guidance schedule, batches that fit, many calls (arXiv 2506.05289, section 4)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alitok_fast.config import GeneratorConfig
from alitok_fast.inference.cuda_graph import Turn
from alitok_fast.inference.guesses import FirstGuesses
from alitok_fast.inference.loop import LastRun, SamplingLoop
from alitok_fast.inference.memory import plan
from alitok_fast.inference.origin import Origin
from alitok_fast.inference.params import SamplingParams, sampling_params
from alitok_fast.inference.state import MOST_COLUMNS
from alitok_fast.inference.step_model import StepModel, prepare
from alitok_fast.inference.window import WindowChoice
from alitok_fast.models.generator import Generator
from alitok_fast.ops.arguments import integer

WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)
KEPT_BYTES = 256 << 20  # a CPU's cache that is larger is freed after the call


def guidance_schedule(num_tokens: int, scale: float, power: float) -> Tensor:
    """(num_tokens,) float32: 1 + (scale - 1) * (1 - cos(pi * (s / num_tokens)^power)) / 2 for step s."""
    steps = torch.arange(num_tokens, dtype=torch.float64) / num_tokens
    return (1 + (scale - 1) * (1 - torch.cos(math.pi * steps**power)) / 2).float()


class Sampler:
    """Samples as `sample` does, and keeps packed weights, caches and CUDA graphs for the next call.

    Calls from several threads take turns, whatever streams they use; an `on_step` that calls its own sampler
    gets a RuntimeError. A sampler can be pickled and copied: caches and graphs are made anew.

    Between two calls a GPU keeps the caches and graphs of up to four batches, a CPU one cache of at most 256 MiB.

    Args:
        gen: the generator, or what `prepare` made of one. A generator that is packed for this sampler is packed anew
            when its weights have changed since.
        weight_dtype, activation_dtype: dtypes of its matrices and of what enters them, as for `prepare`; None takes the
            generator's.
        kv_dtype: dtype of the cache; None takes the model's, torch.float8_e4m3fn stores it in 8 bits (CUDA only).
        window: tokens that a pass may settle for each image, 1..16: the next one, and those after it whose inputs were
            guessed rightly. The images are the same; only the time is not. None, on a CPU, chooses by what passes are
            measured to cost and to settle; on a GPU it is 1.
    """

    def __init__(
        self,
        gen: Generator | StepModel,
        weight_dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        window: int | None = None,
        activation_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = prepare(gen, weight_dtype, activation_dtype)
        self.kv_dtype = kv_dtype
        self.window = None if window is None else integer("window", window, 1, MOST_COLUMNS)
        self.last_run: LastRun | None = None  # of the last call; of its last part where it was sampled in parts
        self._dtypes = weight_dtype, activation_dtype
        self._origin = Origin(gen if isinstance(gen, Generator) and self.model is not gen else None)
        self._begin()

    def _begin(self) -> None:
        self._loops: OrderedDict[tuple, SamplingLoop] = OrderedDict()
        # On a GPU a loop holds its graph, on a CPU nothing that is slow to make again.
        self._kept = 4 if self.model.device.type == "cuda" else 1
        self._choices: dict[tuple, WindowChoice] = {}
        self._guesses = FirstGuesses(self.model.config.num_tokens)
        self._turn = Turn(self.model.device)  # of all loops

    def __getstate__(self) -> dict[str, Any]:
        made = ("_loops", "_kept", "_choices", "_guesses", "_turn")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor | Sequence[int],
        params: SamplingParams | None = None,
        *,
        image_ids: Tensor | Sequence[int] | None = None,
        prompt_tokens: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
        **overrides: Any,
    ) -> Tensor:
        """Sample one token sequence per label; arguments, result and errors are those of `sample`."""
        config, device = self.model.config, self.model.device
        labels = as_ids("labels", labels).to(device)
        count = len(labels)
        image_ids = (
            torch.arange(count, device=device) if image_ids is None else as_ids("image_ids", image_ids).to(device)
        )
        if image_ids.shape != labels.shape:
            raise ValueError(f"image_ids: expected shape {tuple(labels.shape)}, got {tuple(image_ids.shape)}")
        if self.model.training or self._origin.training:
            raise ValueError("gen: expected evaluation mode, got training mode; call gen.eval()")
        chosen = sampling_params(params, overrides).resolved(config)
        if prompt_tokens is not None:
            prompt_tokens = check_prompt(prompt_tokens, count, config, device)
        schedule = None
        if chosen.guidance_scale and chosen.guidance_power:
            schedule = guidance_schedule(config.num_tokens, chosen.guidance_scale, chosen.guidance_power)
        parts = []
        with self._turn:
            self._refresh()
            size = self._most_together(count, chosen.guided)
            for begin in range(0, count, size):
                part = slice(begin, begin + size)
                prompt = None if prompt_tokens is None else prompt_tokens[part]
                loop = self._loop(len(labels[part]), chosen.guided)
                choice, guesses = self._choice(loop), None
                if choice.windows[-1] > 1:
                    guesses = self._guesses.guesses(labels[part]).to(device)
                given = labels[part], schedule, chosen, image_ids[part], prompt, guesses, on_step
                parts.append(loop.run(*given, choice=choice, in_turn=True))
                self.last_run = loop.last_run
                if guesses is not None:
                    self._guesses.remember(labels[part], parts[-1])
            if device.type == "cpu" and sum(loop.nbytes for loop in self._loops.values()) > KEPT_BYTES:
                self._loops.clear()
        tokens = torch.cat(parts)
        _check_sampled(tokens)
        return tokens

    def _choice(self, loop: SamplingLoop) -> WindowChoice:
        """What is known of windows for batches like this one, from earlier calls too."""
        windows = (self.window,) if self.window is not None else WINDOWS if loop.model.device.type == "cpu" else (1,)
        return self._choices.setdefault((loop.batch_size, loop.guided), WindowChoice(windows))

    def current_model(self) -> StepModel:
        """The generator that calls sample with, packed anew where its weights have changed."""
        with self._turn:
            self._refresh()
        return self.model

    def loop(self, batch_size: int, guided: bool) -> SamplingLoop:
        """The loop that samples such batches, kept from an earlier call or made anew. Raises MemoryError."""
        with self._turn:
            return self._loop(batch_size, guided)

    def _refresh(self) -> None:
        """Pack the generator anew where its weights have changed since."""
        gen: Any = self._origin.module
        if self._origin.changed():
            if gen.device != self.model.device:
                raise ValueError(f"gen: expected the generator on {self.model.device}, where it was, got {gen.device}")
            self.model = prepare(gen, *self._dtypes)
            self._origin = Origin(gen)
            self._loops.clear()

    def _loop(self, batch_size: int, guided: bool) -> SamplingLoop:
        key = batch_size, guided
        if key not in self._loops:
            self._make_room(batch_size, guided)
            while len(self._loops) >= self._kept:
                self._loops.popitem(last=False)
            self._loops[key] = SamplingLoop(self.model, *key, self.kv_dtype, self._turn)
        self._loops.move_to_end(key)
        return self._loops[key]

    def _most_together(self, count: int, guided: bool) -> int:
        """How many of `count` images are sampled at a time."""
        if (count, guided) in self._loops:
            return count
        self._make_room(count, guided)
        return min(count, max(1, self._fits(guided)))

    def _make_room(self, batch_size: int, guided: bool) -> None:
        """Free the loops of earlier calls, oldest first, while memory is too short for this one."""
        while self._loops and self._fits(guided) < batch_size:
            self._loops.popitem(last=False)

    def _fits(self, guided: bool) -> int:
        return plan(self.model, guided=guided, kv_dtype=self.kv_dtype, window=self.window or 1).largest_batch


def sample(
    gen: Generator | StepModel,
    labels: Tensor | Sequence[int],
    params: SamplingParams | None = None,
    *,
    image_ids: Tensor | Sequence[int] | None = None,
    prompt_tokens: Tensor | None = None,
    kv_dtype: torch.dtype | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    **overrides: Any,
) -> Tensor:
    """Sample one token sequence per label: (B, N) int64 in [0, codebook_size).

    An image depends on its seed, image id, label and settings alone, not on the batch that it is sampled in.

    Args:
        gen: the generator, in evaluation mode, or what `prepare` made of one. On the CPU a generator is packed for the
            length of the call: to sample more than once, make a `Sampler`.
        labels: (B,) classes in [0, num_classes).
        params: the settings; None takes the defaults of `SamplingParams`.
        image_ids: (B,) ids that key each image's noise; None takes 0..B-1.
        prompt_tokens: (B, n <= N) int64, tokens to keep; the image is completed from there. None starts from nothing.
        kv_dtype: dtype of the cache; None takes the model's, torch.float8_e4m3fn stores it in 8 bits (CUDA only).
        on_step: called as on_step(step, tokens so far (B, step + 1)) after each token. A batch that does not fit in
            memory (`plan`) is sampled in parts, in the order of its images: then B is the part's, and each part begins
            with step 0.
        overrides: single settings of `SamplingParams` in place of those in `params`, such as seed=3.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: the logits became NaN or infinite.
        MemoryError: not even one image fits.
    """
    sampler = Sampler(gen, kv_dtype=kv_dtype)
    return sampler(labels, params, image_ids=image_ids, prompt_tokens=prompt_tokens, on_step=on_step, **overrides)


def as_ids(name: str, value: Tensor | Sequence[int]) -> Tensor:
    """(B,) int64, B >= 1, out of integers; TypeError or ValueError names the argument `name`."""
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected integers of shape (B,), got {value!r}") from None
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"{name}: expected shape (B,) with B >= 1, got {tuple(ids.shape)}")
    if ids.dtype == torch.bool or ids.is_floating_point():
        raise TypeError(f"{name}: expected integers, got {str(ids.dtype).removeprefix('torch.')}")
    return ids.to(torch.int64)


def check_prompt(prompt: Tensor, batch_size: int, config: GeneratorConfig, device: torch.device) -> Tensor:
    """`prompt_tokens` (B, n) on the device; TypeError or ValueError."""
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


def _check_sampled(tokens: Tensor) -> None:
    bad = (tokens < 0).any(1).nonzero().flatten()
    if len(bad):
        step = int((tokens[bad[0]] < 0).nonzero()[0])
        raise RuntimeError(
            f"sampling: expected finite logits, got NaN or infinity in image {int(bad[0])} at step {step}; "
            "the weights or the precision are at fault"
        )
