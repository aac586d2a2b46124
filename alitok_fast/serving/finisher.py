"""What happens to tokens beside the sampling: finished images are decoded, rows are painted, other work is done."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.parts import images_at_a_time
from alitok_fast.inference.row_painter import RowPainter
from alitok_fast.models import Tokenizer
from alitok_fast.serving.request import FAILURES, Request, contained
from alitok_fast.serving.stats import Recorder
from alitok_fast.storage.images import to_uint8

COMPANY_SECONDS = 0.05  # a finished image waits so long for others, where it may
PAINTING_SHARE = 1 / 3  # of the time, at most: who watches must not hold up who waits
_log = logging.getLogger(__name__)


class Finisher:
    """A queue of such work. `work` does one piece of it; who calls that decides beside what it runs.

    Images come first, in batches of all that are there; then calls; then rows, of which only the newest of a request
    are painted.
    """

    def __init__(self, decoder: ImageDecoder, stage1: Tokenizer | None, recorder: Recorder) -> None:
        self._decoder, self._recorder = decoder, recorder
        self._painter = None if stage1 is None else RowPainter(stage1)
        self._patch = decoder.config.patch_size
        self._most = images_at_a_time(decoder.device)
        self._wake = threading.Condition()
        self._images: deque[tuple[Request, Tensor]] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._rows: dict[Request, Tensor] = {}
        self._paint_at = 0.0
        self._busy = 0
        self._closing = False
        self._over: list[Request] = []  # of which the painter may forget what it knows
        self._failures = 0  # images that could not be decoded, one after the other
        self.on_broken: Callable[[str], None] = lambda why: None

    def put_image(self, request: Request, tokens: Tensor) -> None:
        """Decode the finished tokens (N,) of a request, and answer it."""
        with self._wake:
            self._images.append((request, tokens))
            self._wake.notify_all()

    def put_rows(self, request: Request, tokens: Tensor) -> None:
        """Paint the rows that the tokens (n,) so far determine, and show them to the request's caller."""
        with self._wake:
            self._rows[request] = tokens
            self._wake.notify_all()

    def drop_rows(self, request: Request) -> None:
        """Forget rows that are not painted yet."""
        with self._wake:
            self._rows.pop(request, None)
            if self._painter is not None:
                self._over.append(request)

    def put_call(self, future: Future[Any], call: Callable[[], Any]) -> None:
        """Call a function; its result is the future's."""
        with self._wake:
            self._calls.append((future, call))
            self._wake.notify_all()

    def drop_call(self, future: Future[Any]) -> None:
        """A call was cancelled."""
        with self._wake:
            there = len(self._calls)
            self._calls = deque(call for call in self._calls if call[0] is not future)
            if len(self._calls) < there:
                future.set_running_or_notify_cancel()

    @property
    def waiting(self) -> int:
        """Pieces of work that must be done before all requests are answered."""
        return len(self._images) + len(self._calls) + self._busy

    @property
    def calls(self) -> int:
        return len(self._calls)

    def work(self, patient: bool = False) -> bool:
        """Do one piece of work, if there is any that is due; whether there was.

        With `patient` finished images wait a while until there are as many as are decoded together.
        """
        with self._wake:
            batch = []
            if not patient or self._enough():
                batch = [self._images.popleft() for _ in range(min(len(self._images), self._most))]
            call = self._calls.popleft() if self._calls and not batch else None
            rows = None
            if not batch and call is None and self._rows and time.monotonic() >= self._paint_at:
                request = next(iter(self._rows))
                rows = request, self._rows.pop(request)
            self._busy = len(batch) or int(call is not None)
            over, self._over = self._over, []
        if self._painter is not None:
            for request in over:
                self._painter.forget(request)
        try:
            if batch:
                self._finish(batch)
            elif call is not None:
                self._call(*call)
            elif rows is not None:
                self._paint(*rows)
        except BaseException as error:  # the thread ends: whom it was for must not wait
            for request, _ in batch:
                if not request.future.done():
                    request.fail(error if isinstance(error, Exception) else RuntimeError(f"decoding ended: {error!r}"))
            raise
        finally:
            self._busy = 0
        return bool(batch or call or rows)

    def _enough(self) -> bool:
        waited = time.monotonic() - self._images[0][0].sampled if self._images else 0.0
        return len(self._images) >= self._most or waited > COMPANY_SECONDS

    def run(self) -> None:
        """Work until `stop`, and on until nothing is waiting; for a thread of its own, on a stream of its own."""
        try:
            self._run()
        except BaseException as error:
            _log.exception("the thread that decodes ended")
            self.on_broken(f"the thread that decodes ended ({error!r})")

    def _run(self) -> None:
        device = self._decoder.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext():
            while not (self._closing and not self.waiting):
                if not self.work():
                    self._rest()

    def _rest(self) -> None:
        """Until there is something to do."""
        with self._wake:
            if not (self._images or self._calls or self._closing):
                self._wake.wait(max(0.0, self._paint_at - time.monotonic()) if self._rows else None)

    def stop(self, error: Exception | None = None) -> None:
        """End when nothing is waiting; with `error` what waits ends with it."""
        with self._wake:
            self._closing = True
            images, calls = list(self._images) if error else [], list(self._calls) if error else []
            if error:
                self._images.clear()
                self._calls.clear()
            self._rows.clear()
            self._wake.notify_all()
        for request, _ in images:
            self._recorder.ended("failed" if error and request.fail(error) else "cancelled")
        for future, _ in calls:
            if error and future.set_running_or_notify_cancel():
                with contained():
                    future.set_exception(error)

    def _finish(self, batch: list[tuple[Request, Tensor]]) -> None:
        batch = [(request, tokens) for request, tokens in batch if not self._dropped(request)]
        if not batch:
            return
        try:
            images = self._images_of([tokens for _, tokens in batch])
            self._failures = 0
        except Exception as error:  # memory is short, or the device is at fault
            if len(batch) == 1:
                (request, _), *_ = batch
                self._recorder.ended("failed" if request.fail(error) else "cancelled")
                self._failures += 1
                if self._failures >= FAILURES:
                    self.on_broken(f"its last {FAILURES} images could not be decoded ({error})")
                return
            for one in batch:
                self._finish([one])
            return
        for (request, tokens), image in zip(batch, images, strict=True):
            try:
                pixels = to_uint8(image[None])[0]
            except RuntimeError as error:  # NaN: of this image alone
                self._recorder.ended("failed" if request.fail(error) else "cancelled")
                continue
            finished = request.finish(pixels, tokens)
            self._recorder.ended("cancelled" if finished is None else "finished")
            if finished is not None:
                self._recorder.took("image", finished.seconds)

    def _images_of(self, tokens: list[Tensor]) -> Tensor:
        device, images = self._decoder.device, len(tokens)
        if device.type == "cuda":  # each number has a graph: few of them are made
            tokens = tokens + tokens[-1:] * (2 ** (images - 1).bit_length() - images)
        with torch.inference_mode():  # a tenth faster for small decoders
            return self._decoder.decode_again(torch.stack(tokens).to(device))[:images].cpu()

    def _dropped(self, request: Request) -> bool:
        if request.expired and not request.future.cancelled():
            self._recorder.ended("timed_out" if request.fail(request.late()) else "cancelled")
            return True
        if not request.future.cancelled():
            return False
        request.future.set_running_or_notify_cancel()
        self._recorder.ended("cancelled")
        return True

    def _call(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = call()
        except BaseException as error:
            with contained():
                future.set_exception(error)
        else:
            with contained():
                future.set_result(result)

    def _paint(self, request: Request, tokens: Tensor) -> None:
        if self._painter is None or request.on_rows is None or request.future.done():
            return
        begin = time.monotonic()
        try:
            picture = to_uint8(self._painter.rows(request, tokens)[None])[0]
            if request.first_row is None:
                request.first_row = time.monotonic() - request.submitted
                self._recorder.took("first_row", request.first_row)
            request.on_rows(len(picture) // self._patch, picture)
        except BaseException:  # the image itself may be well, and others are
            _log.exception("rows of a request could not be painted or shown; it goes on without")
            request.on_rows = None
        end = time.monotonic()
        self._paint_at = end + (end - begin) * (1 / PAINTING_SHARE - 1)
