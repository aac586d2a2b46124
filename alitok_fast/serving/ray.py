"""The HTTP service under Ray Serve: replicas on one machine or on many, each with its own model and engine.

    serve run alitok_fast.serving.ray:app
    serve run alitok_fast.serving.ray:build model=RUN weight_dtype=int8 max_replicas=4 num_cpus=2

The arguments of `build` are the fields of `LoadOptions`, `ServeSettings` and `ReplicaSettings`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve

from alitok_fast.serving.replicas import Arguments, arguments
from alitok_fast.serving.settings import API_KEYS

HEADER = b"x-replica"
_log = logging.getLogger("alitok_fast.serving")


class Replica:
    """What Serve asks of a replica besides the answers. `serve.ingress` adds `app`, and its end, to it."""

    app: FastAPI

    async def check_health(self) -> None:
        """Returns when requests are answered; raises where the model cannot be loaded or the engine has ended.

        Serve asks for the first time before it sends requests, and takes its time: so a replica counts as one that runs
        when its model is there.
        """
        state = self.app.state
        while True:
            if state.error is not None:
                raise state.error
            if state.service is not None and not state.service.engine.alive:
                raise RuntimeError("engine: expected one that works, got one that has ended")
            if state.ready:
                return
            await asyncio.sleep(0.05)


class NamedReplica:
    """Writes the replica's name into each answer. Plain ASGI, so nothing is buffered."""

    def __init__(self, app: Any, name: str) -> None:
        self._app, self._name = app, name.encode()

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, self._name)]}
            await send(message)

        await self._app(scope, receive, sending)


def replica_app(given: Arguments, keys_expected: bool) -> FastAPI:
    """The application of a replica, made in its process.

    Raises:
        ValueError: keys were there where the application was built, and are not here: anybody could use the replica.
    """
    from alitok_fast.serving.app import create_app

    if not given.settings.keys():
        if keys_expected:
            raise ValueError(f"{API_KEYS}: expected in the environment of each replica, got none")
        _log.warning("anybody who reaches Serve's proxies may use this server: no keys in %s", API_KEYS)
    name = serve.get_replica_context().replica_id.unique_id
    settings = replace(given.settings, host="0.0.0.0")  # Serve's proxies listen, and clients call them by any name
    app = create_app(lambda: given.load.with_stage1(settings.stage1), settings, labels={"replica": name})
    app.add_middleware(NamedReplica, name=name)
    return app


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application: `serve run alitok_fast.serving.ray:build NAME=VALUE ...`, or `args:` in a config file.

    Args:
        args: by name, the fields of `LoadOptions`, `ServeSettings` (without host, port, max_connections and
            access_log, which are Serve's) and `ReplicaSettings`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    given = arguments(args)
    keys_expected = API_KEYS in os.environ

    def make() -> FastAPI:  # a function without parameters is what Serve calls in the replica
        return replica_app(given, keys_expected)

    return serve.deployment(name="alitok", **given.deployment())(serve.ingress(make)(Replica)).bind()


build = build_app  # as it is called on the command line, where the module says what is built
app = build_app({})
