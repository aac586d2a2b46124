"""What stands before the routes: keys, limits of bodies, clients that stall. Plain ASGI, so nothing is buffered."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from alitok_fast.serving.errors import CLIENT_GONE, fault

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_log = logging.getLogger(__name__)


class Refused(HTTPException):
    """A request that gets no further; `fastapi` hands on HTTPExceptions from where it reads a body."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(status, message)
        self.param = param


class _StalledError(Exception):
    """The client reads nothing."""


class Gate:
    """Refuses what has no key, a body that is too large or too slow; drops clients that read nothing.

    Args:
        app: what stands behind.
        keys: one of them is asked for where a route begins with /v1; empty asks for none.
        max_body: bytes.
        stall_seconds: for a body as a whole, and for a piece of an answer.
        observe: called as observe(path's template, method, status, seconds) for each request.
    """

    def __init__(
        self,
        app: Any,
        keys: tuple[bytes, ...],
        max_body: int,
        stall_seconds: float,
        observe: Callable[[str, str, int, float], None],
    ) -> None:
        self._app, self._keys, self._max_body = app, keys, max_body
        self._stall, self._observe = stall_seconds, observe

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begin, status = time.monotonic(), 500
        started = False

        async def sending(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
            try:  # a client that reads nothing fills the buffers; then this waits
                await asyncio.wait_for(send(message), self._stall)
            except (TimeoutError, asyncio.TimeoutError):
                raise _StalledError from None

        try:
            self._check_key(scope)
            await self._app(scope, self._limited(scope, receive), sending)
        except Refused as refused:
            if started:
                raise
            await _answer(send, refused)
            status = refused.status_code
        except _StalledError:  # the server closes a connection whose answer is not complete
            _log.warning("a client read nothing for %g s, and was dropped", self._stall)
            status = CLIENT_GONE
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._observe(route, scope["method"], status, time.monotonic() - begin)

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        # Behind a prefix (a mount, Ray Serve's route_prefix) the path has the prefix too.
        paths = scope["path"], scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._keys or not any(path.startswith("/v1") for path in paths):
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        # All keys are compared, in constant time each.
        right = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if kind.lower() != b"bearer" or not any(right):
            raise Refused(401, "authorization: expected 'Bearer' and a key of this server, got none", "authorization")

    def _limited(self, scope: MutableMapping[str, Any], receive: Receive) -> Receive:
        """`receive`, which raises where the body is too large or takes too long."""
        limit = self._max_body
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = Refused(413, f"body: expected at most {limit} bytes, got more", "body")
        if length.isdigit() and int(length) > limit:
            raise too_large
        read, whole, deadline = 0, False, time.monotonic() + self._stall

        async def limited() -> Message:
            nonlocal read, whole
            if whole:  # what follows is that the client has gone
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
                raise Refused(408, f"body: expected all of it within {self._stall:g} s, got less", "body") from None
            read += len(message.get("body", b""))
            if read > limit:
                raise too_large
            whole = not message.get("more_body", False)
            return message

        return limited


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps(fault(refused.status_code, refused.detail, refused.param)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # Of a body that is too large the rest is not read.
    headers.append((b"www-authenticate", b"Bearer") if refused.status_code == 401 else (b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
