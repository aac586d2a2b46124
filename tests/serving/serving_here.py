"""A server for tests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

LIMIT = 60  # seconds that nothing takes


@contextlib.contextmanager
def served(pipe, stage1, **settings) -> Iterator[SimpleNamespace]:
    """A server on a free port, in a thread: its `url`, `port`, `app`, `service`, `connections` and `stop()`."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    from alitok_fast.serving.app import create_app
    from alitok_fast.serving.connections import Server
    from alitok_fast.serving.settings import ServeSettings

    chosen = ServeSettings(port=0, grace_seconds=LIMIT, **settings)
    app = create_app(lambda: (pipe, stage1), chosen)
    server = Server(app, chosen, host=chosen.host, port=chosen.port, log_level="warning")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(LIMIT)
        assert not thread.is_alive()

    try:
        until(lambda: app.state.ready or app.state.error)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        yield SimpleNamespace(
            url=url,
            port=port,
            app=app,
            service=app.state.service,
            stop=stop,
            connections=server.server_state.connections,
        )
    finally:
        stop()


def until(condition) -> None:
    """Wait for a condition."""
    ends = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.002)
