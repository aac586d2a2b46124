"""Server-sent events: images that are watched while they grow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from alitok_fast.serving.photographs import base64_png
from alitok_fast.serving.request import GeneratedImage
from alitok_fast.serving.waiting import Client

Last = Callable[[int, Future[GeneratedImage]], Awaitable[bytes]]


class Watch:
    """The images of one request, of which a client sees the rows as they are painted.

    Of each image only the newest rows are kept: a client that reads slowly misses some, and holds no memory.
    """

    def __init__(self, grid: int) -> None:
        self._grid = grid
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._newest: dict[int, tuple[int, np.ndarray]] = {}
        self._futures: list[Future[GeneratedImage]] = []

    def on_rows(self, index: int, rows: int, pixels: np.ndarray) -> None:
        """Called by the engine: image `index` has so many rows."""
        self._newest[index] = rows, pixels
        self._tell()

    def follow(self, futures: list[Future[GeneratedImage]]) -> None:
        """These are the images."""
        self._futures = futures
        for future in futures:
            future.add_done_callback(lambda _: self._tell())

    async def events(self, last: Last, client: Client) -> AsyncIterator[bytes]:
        """Rows, then for each image what `last` makes of its end; closing it cancels what is not done."""
        open_ = dict(enumerate(self._futures))
        hung_up = asyncio.ensure_future(client.gone())
        try:
            while open_ and not hung_up.done():
                news = asyncio.ensure_future(self._news.wait())
                await asyncio.wait({news, hung_up}, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                self._news.clear()
                for index in list(self._newest):
                    rows, pixels = self._newest.pop(index)
                    if not self._futures[index].done():
                        picture = await asyncio.to_thread(base64_png, pixels)
                        fields = dict(index=index, rows=rows, of_rows=self._grid, b64_json=picture)
                        yield event("image_generation.partial_image", **fields)
                for index in [index for index, future in open_.items() if future.done()]:
                    yield await last(index, open_.pop(index))
            yield b"data: [DONE]\n\n"
        finally:
            hung_up.cancel()
            for future in self._futures:
                future.cancel()

    def _tell(self) -> None:
        if not self._loop.is_closed():  # the engine outlives a server that was stopped at once
            self._loop.call_soon_threadsafe(self._news.set)


def event(kind: str, **fields: Any) -> bytes:
    """A server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
