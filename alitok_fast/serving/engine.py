"""Requests from many callers, sampled together: continuous batching."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from alitok_fast.inference.params import SEEDS, SamplingParams, sampling_params
from alitok_fast.inference.sampler import WINDOWS, check_prompt
from alitok_fast.inference.slots import SlotLoop, plan_slots
from alitok_fast.inference.thread_team import release_threads
from alitok_fast.models import Tokenizer
from alitok_fast.ops.arguments import integer, real
from alitok_fast.pipelines.class_names import Label
from alitok_fast.pipelines.completion import check_stage1
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.serving.finisher import Finisher
from alitok_fast.serving.request import EngineClosedError, GeneratedImage, Request
from alitok_fast.serving.scheduler import Scheduler
from alitok_fast.serving.stats import EngineStats, Recorder

MOST_IMAGES = {"cpu": 8, "cuda": 64}  # unless it is said how many
WARM_UP_SECONDS = 3600.0  # what is made once may take longer than a request may
_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Engine:
    """Samples images for callers that come when they like, all that are there in the same passes.

    A request takes sequences of the key/value cache, joins the others at the next pass, leaves when its last token is
    drawn, and is decoded with those that finished meanwhile. Its tokens are those that `Pipeline` gives for the same
    label, settings and image id, whatever else was sampled: to the last bit on a CPU (docs/precision.md for GPUs). Its
    pixels are, too, but for the rounding of a decoder that is given another number of images.

    Requests are taken in their order. `submit` may be called from any thread, `generate` from a coroutine. On a GPU
    finished images are decoded by a thread of their own, beside the passes; on a CPU between them, since both need all
    cores. The weights are those of the pipeline when the engine is made, and must not change while it works. An engine
    belongs to its process.

    Args:
        pipe: generator, tokenizer and class names.
        max_images: images with guidance that are sampled at the same time; without guidance twice as many. None is 8 on
            a CPU and 64 on a GPU, or as many as fit in memory (`plan`).
        max_queue: requests that may wait for their turn; more are refused with `QueueFullError`.
        timeout: seconds until the decoding of a request begins, unless it says otherwise; None is no limit.
        stage1: the causal tokenizer that paints rows while an image is sampled (`on_rows`).
        window, kv_dtype: as for `Sampler`.
        turn_seconds: passes go on for about so long before requests can join and leave again.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        MemoryError: not even one image fits.
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        max_images: int | None = None,
        max_queue: int = 256,
        timeout: float | None = None,
        stage1: Tokenizer | None = None,
        window: int | None = None,
        kv_dtype: torch.dtype | None = None,
        turn_seconds: float = 0.01,
    ) -> None:
        self.pipe = pipe
        if stage1 is not None:
            check_stage1(pipe, stage1)
        self.max_queue = integer("max_queue", max_queue, 1)
        self.timeout = None if timeout is None else _positive("timeout", timeout)
        if pipe.generator.training:
            raise ValueError("pipe: expected models in evaluation mode, got a generator in training mode")
        model = pipe.sampler.current_model()
        on_cpu = model.device.type == "cpu"
        windows = (integer("window", window, 1, WINDOWS[-1]),) if window is not None else WINDOWS if on_cpu else (1,)
        self.max_images = self._images_that_fit(max_images, kv_dtype, windows)
        seconds = _positive("turn_seconds", turn_seconds)
        loop = SlotLoop(model, 2 * self.max_images, kv_dtype, windows, seconds)
        self.stage1 = stage1
        recorder = Recorder()
        pipe.image_decoder.refresh()
        finisher = Finisher(pipe.image_decoder, stage1, recorder)
        self._scheduler = Scheduler(loop, finisher, recorder, self.max_queue, windows[-1] > 1, beside=not on_cpu)
        # The threads know the scheduler alone: an engine that nobody holds any more ends, as at the interpreter's end.
        self._process = os.getpid()
        weakref.finalize(self, _abandon, self._scheduler, self._process)
        release_threads()  # of this thread, which has packed the weights; the engine's own is faster without them

    def _images_that_fit(self, asked: int | None, kv_dtype: torch.dtype | None, windows: tuple[int, ...]) -> int:
        model = self.pipe.sampler.model
        fits = plan_slots(model, kv_dtype, windows).largest_batch
        if fits < 1:
            raise MemoryError("max_images: expected memory for at least one image, got too little (alitok_fast.plan)")
        if asked is not None:
            if integer("max_images", asked, 1) > fits:
                raise MemoryError(f"max_images: expected at most the {fits} that fit in memory, got {asked}")
            return asked
        wanted = MOST_IMAGES[model.device.type]
        if fits < wanted:
            _log.warning("memory is short: %d images are sampled at a time instead of %d", fits, wanted)
        return min(fits, wanted)

    # ---- for callers ----

    def submit(
        self,
        label: Label,
        params: SamplingParams | None = None,
        *,
        image_id: int = 0,
        prompt_tokens: Tensor | None = None,
        on_rows: Callable[[int, np.ndarray], None] | None = None,
        timeout: float | None = None,
        **overrides: Any,
    ) -> Future[GeneratedImage]:
        """Ask for one image; returns at once.

        The future can be cancelled until it is done, which frees what the image held at the next pass. It ends with
        RuntimeError where the image's logits or pixels became NaN or infinite, with TimeoutError, or with
        EngineClosedError where the engine is closed before.

        Args:
            label: class, by number or name.
            params, overrides: settings, as for `Pipeline`.
            image_id: keys the image's noise, with the seed.
            prompt_tokens: (n <= N,) int64, tokens to keep; the image is completed from there.
            on_rows: called as on_rows(rows, pixels (rows * patch, W, 3) uint8) as the image grows, with more rows each
                time; some may be skipped. It runs on the engine's thread and should return soon; where it raises, the
                error is logged and the image goes on without it. Needs `stage1`.
            timeout: seconds that this request may take; None takes the engine's.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
            QueueFullError: as many requests wait as may.
            EngineClosedError: after `close`, or where the model fails again and again.
        """
        ids = self.pipe.classes.ids(label)
        if len(ids) != 1:
            raise ValueError(f"label: expected one class, got {len(ids)}")
        config = self.pipe.generator.config
        chosen = sampling_params(params, overrides).resolved(config)
        image_id = integer("image_id", image_id, -SEEDS, SEEDS - 1)
        if prompt_tokens is not None:
            prompt_tokens = torch.as_tensor(prompt_tokens).clone()  # the caller may write on
            prompt_tokens = check_prompt(prompt_tokens[None], 1, config, self.pipe.generator.device)[0]
        if on_rows is not None and self.stage1 is None:
            raise ValueError("on_rows: expected an engine with a causal tokenizer (stage1), got one without")
        limit = self.timeout if timeout is None else _positive("timeout", timeout)
        deadline = None if limit is None else time.monotonic() + limit
        request = Request(ids[0], chosen, image_id, prompt_tokens, on_rows, deadline, limit)
        self._check_process()
        self._scheduler.put(request)
        return request.future

    async def generate(self, label: Label, params: SamplingParams | None = None, **options: Any) -> GeneratedImage:
        """`submit` for coroutines: waits for the image. To cancel the coroutine is to cancel the request."""
        return await asyncio.wrap_future(self.submit(label, params, **options))

    def call(self, work: Callable[[], Result]) -> Future[Result]:
        """Run a function where images are decoded: what else needs the device takes its turn there.

        Raises as `submit`.
        """
        self._check_process()
        future: Future[Result] = Future()
        self._scheduler.put_call(future, work)
        return future

    def warm_up(self) -> None:
        """Sample and decode an image, so that the first caller does not wait for what is made once."""
        self.submit(0, timeout=WARM_UP_SECONDS).result()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._scheduler.alive and self._process == os.getpid()

    def stats(self) -> EngineStats:
        """How many requests wait and run, what has been done, how long it took."""
        return self._scheduler.stats()

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests, and end.

        With `drain` those that are there are finished first, for at most `timeout` seconds; the others end with
        EngineClosedError. Returns when the threads have ended; False where one of them called. It may be called more
        than once.
        """
        return self._process != os.getpid() or self._scheduler.close(drain, timeout)

    def _check_process(self) -> None:
        """A process that was forked has the engine, but not its threads."""
        if self._process != os.getpid():
            raise EngineClosedError("engine: expected one of this process, got that of the process it was forked from")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("engine: it belongs to its process; make one in each from a Pipeline, which can be pickled")


def _abandon(scheduler: Scheduler, process: int) -> None:
    if process == os.getpid():  # a lock may have been held when this one was forked
        scheduler.abandon()


def _positive(name: str, value: float) -> float:
    number = real(name, value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return number
