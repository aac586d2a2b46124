"""Sampling token sequences: guidance schedule and the cached loop (arXiv 2506.05289, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from alitok_fast._library import native_enabled
from alitok_fast.config import GeneratorConfig
from alitok_fast.cuda_graph import capture
from alitok_fast.decoding import Decoder
from alitok_fast.memory import plan
from alitok_fast.models.generator import Generator
from alitok_fast.models.kv_cache import KVCache
from alitok_fast.ops.decode import Drawing, draw_next


def guidance_schedule(tokens: int, scale: float, power: float) -> Tensor:
    """(tokens,) float32: 1 + (scale - 1) * (1 - cos(pi * (s / tokens)^power)) / 2 for step s."""
    steps = torch.arange(tokens, dtype=torch.float64) / tokens
    return (1 + (scale - 1) * (1 - torch.cos(math.pi * steps**power)) / 2).float()


class StepModel(Protocol):
    """What the loop needs of a model: `models.Generator` and `decoding.Decoder` have it."""

    config: GeneratorConfig
    device: torch.device
    training: bool
    cache_dtype: torch.dtype

    def new_cache(self, rows: int, dtype: torch.dtype | None = None) -> KVCache: ...
    def step(self, ids: Tensor, cache: KVCache) -> Tensor: ...
    def condition_ids(self, labels: Tensor | None, batch: int) -> Tensor: ...


def for_steps(gen: StepModel) -> StepModel:
    """What to step with: a generator on the CPU packed into a `Decoder` of its own dtype, anything else as it is."""
    native = isinstance(gen, Generator) and gen.device.type == "cpu" and native_enabled()
    return Decoder(gen) if native else gen


class SamplingLoop:
    """One batch being drawn. All that a step reads or writes are tensors that stay where they are.

    On a CUDA device the first run captures a step as a CUDA graph and replays it: no launch overhead, nothing read
    back. A loop can be run again with other labels, seeds and schedules.

    A generator on the CPU is packed into a `Decoder` of its own dtype, which draws many tokens in one native call;
    inside `use_reference` it runs as it is.
    """

    STEPS_PER_CALL = 16  # Ctrl-C waits for the end of a native call; starting one costs far less than a step

    def __init__(
        self,
        model: StepModel,
        batch: int,
        guided: bool,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.batch, self.guided = for_steps(model), batch, guided
        rows, steps, device = batch * (2 if guided else 1), model.config.tokens, model.device
        try:
            self.cache = self.model.new_cache(rows, kv_dtype)
        except RuntimeError as error:
            size = rows * KVCache.bytes_per_row(model.config, kv_dtype or self.model.cache_dtype)
            raise MemoryError(
                f"labels: expected a batch whose cache fits in memory, got {batch} images, {size / 2**30:.1f} GiB; "
                "alitok_fast.plan(gen) says how many fit"
            ) from error

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.drawing = Drawing(
            ids=zeros(rows),
            tokens=zeros(batch, steps),
            prompt_length=zeros(),
            schedule=zeros(steps, dtype=torch.float32) if guided else None,
            seed=zeros(),
            image_ids=zeros(batch),
            temperature=float(temperature),
            top_k=top_k,
            top_p=top_p,
        )
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(
        self,
        labels: Tensor,
        schedule: Tensor | None,
        seed: int,
        image_ids: Tensor,
        prompt_tokens: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """tokens (B, N); arguments as in `sample`, already checked. Rows without a distribution hold -1."""
        if self.model.device.type == "cuda" and self._graph is None:
            self._start(labels, schedule, seed, image_ids, prompt_tokens)
            self._graph = capture(self.model.device, self.step)
        self._start(labels, schedule, seed, image_ids, prompt_tokens)
        tokens = self.drawing.tokens
        length = tokens.shape[1]
        stride = 1 if on_step is not None else self.STEPS_PER_CALL
        for begin in range(0, length, stride):
            end = min(begin + stride, length)
            self._advance(end - begin)
            if on_step is not None:
                on_step(begin, tokens[:, :end])
        return tokens.clone()

    def step(self) -> None:
        """Feed the current ids, draw the next token of each image and make it current."""
        position = self.cache.position.clone()
        draw_next(self.drawing, self.model.step(self.drawing.ids, self.cache), position)

    def _advance(self, steps: int) -> None:
        if isinstance(self.model, Decoder):
            return self.model.draw(self.drawing, self.cache, steps)
        for _ in range(steps):
            self.step() if self._graph is None else self._graph.replay()

    def _start(self, labels, schedule, seed, image_ids, prompt_tokens) -> None:
        drawing, condition = self.drawing, self.model.condition_ids(labels, self.batch)
        if self.guided:
            condition = torch.cat([condition, self.model.condition_ids(None, self.batch)])
            drawing.schedule.copy_(schedule)
        drawing.ids.copy_(condition)
        self.cache.position.zero_()
        drawing.seed.fill_(seed)
        drawing.image_ids.copy_(image_ids)
        drawing.prompt_length.fill_(0 if prompt_tokens is None else prompt_tokens.shape[1])
        if prompt_tokens is not None:
            drawing.tokens[:, : prompt_tokens.shape[1]] = prompt_tokens


@torch.no_grad()
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
    loop: SamplingLoop | None = None,
) -> Tensor:
    """Draw one token sequence per label: (B, N) int64 in [0, codebook_size).

    An image depends on (seed, its image id, its label, the settings) alone, not on the batch it is drawn in.

    Args:
        gen: the generator, in evaluation mode, or a `Decoder` made from one on the CPU. Such a generator is packed
            into a decoder of its own dtype for the length of the call: whoever samples more than once passes one.
        labels: (B,) classes in [0, classes).
        guidance_scale: >= 0; 0 switches guidance off and halves the work. None takes the preset's value.
        guidance_power: > 0, exponent of the schedule. None takes the preset's value.
        temperature: >= 0; 0 takes the largest logit.
        top_k: keep the k largest logits; None keeps all.
        top_p: keep the smallest set with this mass, in (0, 1]; None keeps all.
        seed: key of the noise.
        image_ids: (B,) ids keying each image's noise; None takes 0..B-1.
        prompt_tokens: (B, n <= N) tokens to keep; the image is completed from there. None starts from nothing.
        kv_dtype: of the key/value cache; None is the model's, torch.float8_e4m3fn stores it in 8 bits.
        on_step: called as on_step(step, tokens so far (B, step + 1)) after each token; for one part after the other
            of a batch that does not fit in memory (`plan`).
        loop: a `SamplingLoop` to run again, made for this batch and these settings; None makes one for this call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: the logits became NaN or infinite.
        MemoryError: not even one image fits.
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
    if prompt_tokens is not None:
        prompt_tokens = _check_prompt(prompt_tokens, len(labels), config, device)
    guided = scale != 0
    size = len(labels)
    if loop is None:
        gen = for_steps(gen)
        size = min(size, max(1, plan(gen, guided=guided, kv_dtype=kv_dtype).largest_batch))
    elif (loop.batch, loop.guided) != (size, guided):
        raise ValueError(
            f"loop: expected one for batch {len(labels)}, guided {guided}, got batch {loop.batch}, guided {loop.guided}"
        )
    schedule = guidance_schedule(config.tokens, scale, power) if guided else None
    drawn = []
    for begin in range(0, len(labels), size):
        part = slice(begin, begin + size)
        if loop is None or loop.batch != len(labels[part]):
            loop = None  # before the next one is made: its memory is needed
            loop = SamplingLoop(gen, len(labels[part]), guided, temperature, top_k, top_p, kv_dtype)
        prompt = None if prompt_tokens is None else prompt_tokens[part]
        drawn.append(loop.run(labels[part], schedule, seed, image_ids[part], prompt, on_step))
    tokens = torch.cat(drawn)
    _check_drawn(tokens)
    return tokens


def _as_ids(name: str, value: Tensor | Sequence[int], device: torch.device) -> Tensor:
    ids = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"{name}: expected shape (B,) with B >= 1, got {tuple(ids.shape)}")
    if ids.dtype == torch.bool or ids.is_floating_point():
        raise TypeError(f"{name}: expected integers, got {str(ids.dtype).removeprefix('torch.')}")
    return ids.to(device, torch.int64)


def _check_at_least(name: str, value: float, low: float, strictly: bool = False) -> None:
    if not math.isfinite(value) or value < low or (strictly and value == low):
        raise ValueError(f"{name}: expected a finite number {'>' if strictly else '>='} {low:g}, got {value!r}")


def _check_prompt(prompt: Tensor, batch: int, config: GeneratorConfig, device: torch.device) -> Tensor:
    if prompt.ndim != 2 or len(prompt) != batch or prompt.shape[1] > config.tokens:
        raise ValueError(f"prompt_tokens: expected shape ({batch}, n <= {config.tokens}), got {tuple(prompt.shape)}")
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
