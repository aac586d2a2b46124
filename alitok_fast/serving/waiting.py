"""Waiting for what an engine promised, as long as somebody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import Future
from typing import TypeVar

from fastapi import Request

from alitok_fast.serving.errors import ClientGoneError

Result = TypeVar("Result")


async def answered(futures: list[Future[Result]], request: Request, timeout: float) -> list[Result]:
    """The results, unless the client goes away, one fails or it takes too long: then the others are cancelled."""
    hung_up = asyncio.ensure_future(gone(request))
    results = asyncio.ensure_future(_all(futures))
    try:
        done, _ = await asyncio.wait({hung_up, results}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if results in done:
            return results.result()
        if done:
            raise ClientGoneError
        raise TimeoutError(f"timeout: expected an answer within {timeout:g} s, got none")
    finally:
        for future in futures:
            future.cancel()
        hung_up.cancel()
        results.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await results


async def _all(futures: list[Future[Result]]) -> list[Result]:
    return await asyncio.gather(*map(asyncio.wrap_future, futures))


async def gone(request: Request) -> None:
    """Returns when the client has hung up; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
