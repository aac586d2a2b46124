"""What stands before the routes: keys, names, limits of bodies, clients that stall. Plain ASGI: nothing is buffered."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from alitok_fast.serving.errors import CLIENT_GONE, RETRY_SECONDS, fault

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_log = logging.getLogger(__name__)


class Refused(HTTPException):
    """A request that gets no further; `fastapi` hands on HTTPExceptions from where it reads a body."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        # What is left of a body is not read.
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {"Connection": "close"}
        super().__init__(status, message, headers | ({"Retry-After": RETRY_SECONDS} if status == 503 else {}))
        self.param = param


class _StalledError(Exception):
    """The client reads nothing."""


class Gate:
    """Refuses what has no key or another server's name, bodies that are too large, too slow or no JSON; drops clients
    that read nothing. HEAD is answered as GET is, without the body, which the server leaves out.

    Args:
        app: what stands behind.
        keys: one of them is asked for where a route begins with /v1; empty asks for none.
        hosts: names by which clients may call this server; empty takes any.
        max_body: bytes.
        max_bodies: bytes of all bodies together, from the first that is read until the request is answered.
        stall_seconds: for a body as a whole, and for a piece of an answer.
        observe: called as observe(path's template, method, status, seconds) for each request.
    """

    def __init__(
        self,
        app: Any,
        keys: tuple[bytes, ...],
        hosts: frozenset[str],
        max_body: int,
        max_bodies: int,
        stall_seconds: float,
        observe: Callable[[str, str, int, float], None],
    ) -> None:
        self._app, self._keys, self._hosts = app, keys, hosts
        self.max_body, self.max_bodies, self.stall_seconds = max_body, max_bodies, stall_seconds
        self.held = 0  # bytes of bodies
        self._observe = observe

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begin, status, method = time.monotonic(), 500, scope["method"]
        started = False
        scope = {**scope, "method": "GET" if method == "HEAD" else method}
        body = _Body(self, receive)

        async def sending(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
            try:  # a client that reads nothing fills the buffers; then this waits
                await asyncio.wait_for(send(message), self.stall_seconds)
            except (TimeoutError, asyncio.TimeoutError):
                raise _StalledError from None

        try:
            headers = dict(reversed(scope["headers"]))  # the first of a name counts
            self._check_host(headers)
            self._check_key(scope, headers)
            self._check_body(headers)
            await self._app(scope, body.receive, sending)
        except Refused as refused:
            if started:
                raise
            await _answer(send, refused)
            status = refused.status_code
        except _StalledError:  # the server closes a connection whose answer is not complete
            _log.warning("a client read nothing for %g s, and was dropped", self.stall_seconds)
            status = CLIENT_GONE
        finally:
            body.forget()
            route = getattr(scope.get("route"), "path", "none")
            self._observe(route, method, status, time.monotonic() - begin)

    def _check_host(self, headers: Mapping[bytes, bytes]) -> None:
        """A page of another origin may have its name lead to this machine; then the browser sends that name."""
        given = headers.get(b"host", b"").decode("latin-1")
        if self._hosts and host_name(given) not in self._hosts:
            message = f"host: expected a name of this server (--allowed-hosts), got {given!r}"
            raise Refused(400, message, "host")

    def _check_key(self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes]) -> None:
        # Behind a prefix (a mount, Ray Serve's route_prefix) the path has the prefix too.
        paths = scope["path"], scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._keys or not any(path.startswith("/v1") for path in paths):
            return
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        # All keys are compared, in constant time each.
        right = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if kind.lower() != b"bearer" or not any(right):
            raise Refused(401, "authorization: expected 'Bearer' and a key of this server, got none", "authorization")

    def _check_body(self, headers: Mapping[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise self.too_large()
        if length == b"0" and b"transfer-encoding" not in headers:
            return
        given = headers.get(b"content-type", b"").decode("latin-1")
        # Other types are what a page of another origin may send without being asked whether it may.
        if given.partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, f"content-type: expected application/json, got {given or 'none'!r}", "content-type")

    def too_large(self) -> Refused:
        return Refused(413, f"body: expected at most {self.max_body} bytes, got more", "body")


class _Body:
    """The body of a request, as it comes: `receive` raises where it is too large or takes too long."""

    def __init__(self, gate: Gate, receive: Receive) -> None:
        self._gate, self._receive = gate, receive
        self._read, self._whole = 0, False
        self._deadline = time.monotonic() + gate.stall_seconds

    async def receive(self) -> Message:
        if self._whole:  # what follows is that the client has gone
            return await self._receive()
        gate = self._gate
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            raise Refused(408, f"body: expected all of it within {gate.stall_seconds:g} s, got less", "body") from None
        more = len(message.get("body", b""))
        self._read += more
        gate.held += more
        if self._read > gate.max_body:
            raise gate.too_large()
        if gate.held > gate.max_bodies:
            raise Refused(503, "body: expected less at a time, got too many large ones; try again later", "body")
        self._whole = not message.get("more_body", False)
        return message

    def forget(self) -> None:
        self._gate.held -= self._read


def host_name(host: str) -> str:
    """The name or address in a `Host` header, without the port."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps(fault(refused.status_code, refused.detail, refused.param)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(refused.headers or {})}
    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status_code, "headers": lines})
    await send({"type": "http.response.body", "body": body})
