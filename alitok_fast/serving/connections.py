"""Connections that nobody uses any more are closed: uvicorn waits for what a client never sends or reads."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from alitok_fast.serving.settings import ServeSettings

LOOKS = 4  # at a connection in the time that it may stall


def server_config(app: Any, settings: ServeSettings, **options: Any) -> uvicorn.Config:
    """How uvicorn serves the application; `options` are uvicorn's own."""

    class Connection(_Connection):
        stall_seconds = settings.stall_seconds

    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=int(settings.grace_seconds) + 1,
        server_header=False,
        access_log=settings.access_log,
        **options,
    )


class _Connection(H11Protocol):
    """uvicorn's protocol, which also ends a connection where nothing happens for about `stall_seconds`: no request is
    being answered, none begins, and nothing of the last answer is read.

    While a request is answered, `Gate` looks after its body and its reader. (uvicorn's faster parser is not taken: it
    does not notice a client that hangs up while it has sent a second request.)
    """

    stall_seconds: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread, self._used = 0, self.loop.time()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._used = self.loop.time()
        super().on_response_complete()

    def _look_later(self) -> None:
        self._watch = self.loop.call_later(self.stall_seconds / LOOKS, self._look)

    def _look(self) -> None:
        unread, before = self.transport.get_write_buffer_size(), self._unread
        self._unread = unread
        answering = self.cycle is not None and not self.cycle.response_complete
        if (answering and not self.transport.is_closing()) or unread < before:
            self._used = self.loop.time()
        elif self.loop.time() - self._used >= self.stall_seconds:
            self.transport.abort()  # to close it would wait until all is read
            return
        self._look_later()
