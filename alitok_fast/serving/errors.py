"""How what goes wrong is answered: JSON in the shape that clients of image APIs know, with the field's name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from alitok_fast.serving.request import EngineClosedError, QueueFullError
from alitok_fast.serving.schemas import UNKNOWN, Error, Problem
from alitok_fast.storage.text import shown

CLIENT_GONE = 499  # nobody reads it; the metrics count it
RETRY_SECONDS = "1"
KINDS: dict[int, Any] = {
    401: "authentication_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_log = logging.getLogger(__name__)


class FieldError(ValueError):
    """A request that cannot be answered, because of one of its fields."""

    def __init__(self, param: str | None, message: str, status: int = 400) -> None:
        super().__init__(message if param is None else f"{param}: {message}")
        self.param, self.status = param, status


@contextlib.contextmanager
def of_fields(**fields: str) -> Iterator[None]:
    """Inside, ValueError and TypeError that name an argument are faults of the request: of the field that is called as
    the argument is, or as `fields` says."""
    try:
        yield
    except (ValueError, TypeError) as error:
        name, colon, rest = str(error).partition(": ")
        if not colon or not name.isidentifier():
            raise
        raise FieldError(fields.get(name, name), rest) from None


class ClientGoneError(Exception):
    """The client has hung up."""


def fault(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an answer with this status."""
    kind: Literal["invalid_request_error"] = KINDS.get(status, "invalid_request_error")
    return Error(
        error=Problem(message=shown(message, limit=1000), type=kind, param=param and shown(param, limit=80), code=code)
    ).model_dump()


def status_and_body(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and body for an error of ours; what nobody foresaw is logged, and not shown."""
    message = " ".join(str(error).split())
    if isinstance(error, FieldError):
        return error.status, fault(error.status, message, error.param)
    if isinstance(error, QueueFullError):
        return 503, fault(503, message, code="queue_full")
    if isinstance(error, EngineClosedError):
        return 503, fault(503, message, code="stopping")
    if isinstance(error, TimeoutError):
        return 504, fault(504, message or "timeout: expected an answer in time, got none", code="timeout")
    if isinstance(error, ClientGoneError | asyncio.CancelledError):
        return CLIENT_GONE, fault(CLIENT_GONE, "the client has gone")
    if not isinstance(error, (RuntimeError, MemoryError)):
        _log.error("a request failed", exc_info=error)
        return 500, fault(500, "the server failed; its log has the reason")
    _log.warning("a request failed: %s", message)
    return 500, fault(500, message or type(error).__name__)


def add_handlers(app: FastAPI) -> None:
    """Answer every error of a route with `status_and_body`, and those of the framework in the same shape."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        status, body = status_and_body(error)
        headers = {"Retry-After": RETRY_SECONDS} if status == 503 else None
        return JSONResponse(body, status, headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return JSONResponse(fault(400, "body: expected JSON", "body"), 400)
        if first["type"] == UNKNOWN:
            name = first["ctx"]["name"]
            message = f"{name}: expected one of the fields {first['ctx']['fields']}, got {name!r}"
            return JSONResponse(fault(400, message, name), 400)
        param = str(first["loc"][1]) if len(first["loc"]) > 1 else "body"
        got = repr(first.get("input"))
        if isinstance(first.get("input"), (dict, list)) or first["type"] == "missing":
            got = "nothing" if first["type"] == "missing" else type(first["input"]).__name__
        expected = first["msg"][:1].lower() + first["msg"][1:]
        return JSONResponse(fault(400, f"{param}: {expected}, got {shown(got, limit=80)}", param), 400)

    async def framework(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        body = fault(error.status_code, str(error.detail), getattr(error, "param", None), getattr(error, "code", None))
        return JSONResponse(body, error.status_code, error.headers)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, framework)
    for kind in (ValueError, TypeError, RuntimeError, MemoryError, TimeoutError, ClientGoneError):
        app.add_exception_handler(kind, ours)
