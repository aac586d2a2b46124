"""Waiting for what an engine promised, as long as somebody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import Future
from typing import TypeVar

from fastapi import Request

from alitok_fast.serving.errors import ClientGoneError

Result = TypeVar("Result")


class Client:
    """Who sent a request, which has been read, and wants an answer within `timeout` seconds from now."""

    def __init__(self, request: Request, timeout: float) -> None:
        self._request, self._timeout = request, timeout
        self._deadline = time.monotonic() + timeout

    def seconds_left(self) -> float:
        """Raises TimeoutError where there are none."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    async def answered(self, futures: list[Future[Result]]) -> list[Result]:
        """The results, unless the client goes away, one fails or it takes too long: then the others are cancelled."""
        hung_up = asyncio.ensure_future(self.gone())
        results = asyncio.ensure_future(_all(futures))
        try:
            left = self.seconds_left()
            done, _ = await asyncio.wait({hung_up, results}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if results in done:
                return results.result()
            if done:
                raise ClientGoneError
            raise self._late()
        finally:
            for future in futures:
                future.cancel()
            hung_up.cancel()
            results.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await results

    async def gone(self) -> None:
        """Returns when the client has hung up."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    def _late(self) -> TimeoutError:
        return TimeoutError(f"timeout: expected an answer within {self._timeout:g} s, got none")


async def _all(futures: list[Future[Result]]) -> list[Result]:
    return await asyncio.gather(*map(asyncio.wrap_future, futures))
