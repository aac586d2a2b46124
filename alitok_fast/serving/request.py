"""A request for one image, from its submission to its end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from alitok_fast.inference.params import SamplingParams

FAILURES = 3  # one after the other, of passes or of decoding: then the model or the device is taken for broken
_log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """As many requests wait as may; try again later."""


class EngineClosedError(RuntimeError):
    """The engine takes no requests: it was closed, or its model fails again and again."""


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """For a future that is set: what a callback of it raises is logged, also where it is no Exception (as
    asyncio.CancelledError), which `Future` itself lets through to the thread that works for all."""
    try:
        yield
    except BaseException:
        _log.exception("a callback of a future failed")


@dataclass(frozen=True)
class GeneratedImage:
    """An image, and how it came about.

    Attributes:
        pixels: (H, W, 3) uint8.
        tokens: (N,) int64.
        label, image_id, params: what was asked for; with the weights they determine the image.
        passes: that it took, those that read a prompt included.
        seconds_queued, seconds_sampling, seconds_decoding: until it got its sequences, its tokens, its pixels.
        seconds_first_row: until its first row was painted; None where nobody watched.
    """

    pixels: np.ndarray
    tokens: Tensor
    label: int
    image_id: int
    params: SamplingParams
    passes: int
    seconds_queued: float
    seconds_sampling: float
    seconds_decoding: float
    seconds_first_row: float | None = None

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image, made at each call."""
        return Image.fromarray(self.pixels)

    @property
    def seconds(self) -> float:
        """From submission to pixels."""
        return self.seconds_queued + self.seconds_sampling + self.seconds_decoding


@dataclass(eq=False)
class Request:
    """What the engine knows of a request. It belongs to one thread at a time; the future belongs to everybody.

    The future stays pending until the end, so that it can be cancelled at any time before.
    """

    label: int
    params: SamplingParams
    image_id: int
    prompt: Tensor | None
    on_rows: Callable[[int, np.ndarray], None] | None
    deadline: float | None  # by time.monotonic()
    timeout: float | None
    future: Future[GeneratedImage] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    joined: float = 0.0
    sampled: float = 0.0
    first_row: float | None = None
    rows: int = 0  # that were handed on for painting
    passes: int = 0

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def late(self) -> TimeoutError:
        return TimeoutError(f"timeout: expected an image within {self.timeout:g} s, got none")

    def finish(self, pixels: np.ndarray, tokens: Tensor) -> GeneratedImage | None:
        """Give the caller the image; None where the request was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return None
        image = GeneratedImage(
            pixels,
            tokens,
            self.label,
            self.image_id,
            self.params,
            self.passes,
            self.joined - self.submitted,
            self.sampled - self.joined,
            time.monotonic() - self.sampled,
            self.first_row,
        )
        with contained():
            self.future.set_result(image)
        return image

    def fail(self, error: BaseException) -> bool:
        """Give the caller an error; False where the request was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return False
        with contained():
            self.future.set_exception(error)
        return True
