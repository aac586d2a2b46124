"""What stands before the routes: keys, names, limits of bodies. Plain ASGI, so nothing is buffered."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from alitok_fast.serving.errors import CLIENT_GONE, RETRY_SECONDS, fault
from alitok_fast.serving.settings import host_name

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
SMALL = 65536  # bytes of a body; connections have a limit of their own


class Refused(HTTPException):
    """A request that gets no further; `fastapi` hands on HTTPExceptions from where it reads a body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        headers = {
            401: {"WWW-Authenticate": "Bearer"},
            408: {"Connection": "close"},
            503: {"Retry-After": RETRY_SECONDS},
        }
        super().__init__(status, message, headers.get(status))
        self.param, self.code = param, code


class Gate:
    """Refuses what has no key or another server's name, bodies that are too large, too slow or no JSON.
    HEAD is answered as GET is, without the body, which the server leaves out.

    Args:
        app: what stands behind.
        keys: one of them is asked for where a route begins with /v1; empty asks for none.
        hosts: names by which clients may call this server; empty takes any.
        max_body: bytes.
        max_bodies: bytes of all bodies together, from the first that is read until the request is answered; `SMALL`
            ones are taken all the same.
        stall_seconds: for a body as a whole.
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
        scope = {**scope, "method": "GET" if method == "HEAD" else method}
        body = _Body(self, receive)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                body.answered = True
            await send(message)

        try:
            headers = dict(reversed(scope["headers"]))  # the first of a name counts
            self._check_host(headers)
            self._check_key(scope, headers)
            self._check_body(headers)
            await self._app(scope, body.receive, sending)
        except Refused as refused:  # before the application has begun
            await answer(sending, refused)
        finally:
            body.forget()
            route = getattr(scope.get("route"), "path", "none")
            self._observe(route, method, CLIENT_GONE if body.gone else status, time.monotonic() - begin)

    def _check_host(self, headers: Mapping[bytes, bytes]) -> None:
        """A page of another origin may have its name lead to this machine; then the browser sends that name."""
        given = headers.get(b"host", b"").decode("latin-1")
        if given and self._hosts and host_name(given) not in self._hosts:
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
            got = "another" if kind.lower() == b"bearer" and key.strip() else "none"
            message = f"authorization: expected 'Bearer' and a key of this server, got {got}"
            raise Refused(401, message, "authorization")

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
        self.answered = False
        self.gone = False  # the client has hung up before it was answered
        self._deadline = time.monotonic() + gate.stall_seconds

    async def receive(self) -> Message:
        if self._whole:  # what follows is that the client has gone
            message = await self._receive()
            self.gone = not self.answered
            return message
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
        if gate.held > gate.max_bodies and self._read > SMALL:
            reason = "body: expected less at a time, got too many large ones; try again later"
            raise Refused(503, reason, "body", "queue_full")
        self.gone = message["type"] == "http.disconnect"
        self._whole = not message.get("more_body", False)
        return message

    def forget(self) -> None:
        self._gate.held -= self._read


async def answer(send: Send, refused: Refused) -> None:
    """What a refused request gets, as JSON."""
    body = json.dumps(fault(refused.status_code, refused.detail, refused.param, refused.code)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(refused.headers or {})}
    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status_code, "headers": lines})
    await send({"type": "http.response.body", "body": body})
