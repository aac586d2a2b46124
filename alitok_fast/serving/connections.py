"""Connections that nobody uses any more are closed: uvicorn waits for what a client never sends or reads."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import socket
import sys
import termios
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from alitok_fast.serving.limits import Refused, answer
from alitok_fast.serving.settings import ServeSettings

LOOKS = 4  # at a connection in the time that it may stall
READ_AHEAD = 65536  # bytes of further requests that are taken while one is answered
_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server for the application of `create_app`; `options` are those of `uvicorn.Config`."""

    def __init__(self, app: Any, settings: ServeSettings, **options: Any) -> None:
        class Connection(_Connection):
            stall_seconds = settings.stall_seconds
            max_connections = settings.max_connections

        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            timeout_graceful_shutdown=int(settings.grace_seconds) + 2,
            server_header=False,
            access_log=settings.access_log,
            **options,
        )
        super().__init__(config)
        self._app, self._grace_seconds = app, settings.grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which cuts off what takes too long; a little before, that is given up, and told so."""
        timer = asyncio.get_running_loop().call_later(self._grace_seconds, self._app.state.give_up)
        await super().shutdown(sockets)
        timer.cancel()


async def _too_many(scope: Any, receive: Any, send: Any) -> None:
    """The application of a connection that is one too many."""
    refused = Refused(503, "connections: expected fewer at the same time; try again later", code="queue_full")
    refused.headers = {**(refused.headers or {}), "Connection": "close"}
    await answer(send, refused)


class _Connection(H11Protocol):
    """uvicorn's protocol, which also ends a connection where nothing happens for about `stall_seconds`: no request
    begins, none is being worked on, and nothing of an answer is read.

    A body that does not come is the business of `Gate`. (uvicorn's faster parser is not taken: it does not notice a
    client that hangs up while it has sent a second request.)
    """

    stall_seconds: float
    max_connections: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self.app = _too_many
        self._unread, self._used = 0, self.loop.time()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._used = self.loop.time()
        super().on_response_complete()

    def handle_events(self) -> None:
        super().handle_events()
        # Where a second request has come, uvicorn reads no more, and would not see that the client hangs up.
        waits = self.cycle is not None and not self.cycle.response_complete and self.conn.their_state is h11.DONE
        if waits and len(self.conn.trailing_data[0]) < READ_AHEAD:
            self.flow.resume_reading()

    def _look_later(self) -> None:
        self._watch = self.loop.call_later(self.stall_seconds / LOOKS, self._look)

    def _look(self) -> None:
        before, self._unread = self._unread, self._unread_bytes()
        answering = self.cycle is not None and not self.cycle.response_complete
        works = answering and not self.flow.write_paused and not self.transport.is_closing()
        if works or self._unread < before:
            self._used = self.loop.time()
        elif self.loop.time() - self._used >= self.stall_seconds:
            if self._unread:
                _log.warning("a client read nothing for %g s, and was dropped", self.stall_seconds)
            self.transport.abort()  # to close it would wait until all is read
            return
        self._look_later()

    def _unread_bytes(self) -> int:
        """What the client has not taken yet: here, and where the system tells it, in the system's buffer."""
        unread: int = self.transport.get_write_buffer_size()
        with contextlib.suppress(OSError, ValueError):  # a transport that has no such socket
            number = self.transport.get_extra_info("socket").fileno()
            unread += int.from_bytes(fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return unread
