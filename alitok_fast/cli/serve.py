"""`alitok-fast serve`: the HTTP service."""

from __future__ import annotations

import socket
from typing import Any

import typer

from alitok_fast.cli.options import LoadOptions, with_options
from alitok_fast.serving.settings import API_KEYS, ServeSettings


@with_options(load=LoadOptions, settings=ServeSettings)
def serve(load: Any, settings: Any) -> None:
    """Serve a model over HTTP: images of classes, completions, tokens, reconstructions, and a page to try them on.

    \b
    Examples:
      alitok-fast serve
      alitok-fast serve --model b.bin --tokenizer tokenizer.pth --stage1 stage1.pth --weight-dtype int8
      curl localhost:8000/v1/images/generations -H "Content-Type: application/json" \\
        -d '{"prompt": "bag", "response_format": "png"}' > bag.png

    Requests that arrive at the same time are sampled together. SIGTERM and Ctrl-C finish what runs. /openapi.json
    describes the interface, /metrics is for Prometheus.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name}: expected to be installed: pip install 'alitok_fast[serve]'") from None
    from alitok_fast.inference.thread_team import release_threads
    from alitok_fast.serving.app import create_app
    from alitok_fast.serving.connections import Server

    keys = settings.keys()
    if not settings.on_loopback and not keys:
        typer.echo(f"anybody who reaches {settings.host} may use this server: no keys in {API_KEYS}", err=True)
    loaded = load.with_stage1(settings.stage1)
    release_threads()  # of this thread, which only waits from now on
    listener = _listen(settings.host, settings.port)
    server: Server

    def stop() -> None:
        server.should_exit = True

    app = create_app(lambda: loaded, settings, stop)
    server = Server(app, settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    typer.echo(f"serving {load.model} on http://{host}:{listener.getsockname()[1]}")
    server.run([listener])
    if app.state.error is not None:
        raise app.state.error


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError names the argument."""
    try:
        socket.getaddrinfo(host, port)  # `create_server` does not tell a wrong name from a port that is taken
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except socket.gaierror as error:
        raise OSError(f"host: expected an address of this machine, got {host!r} ({error.strerror})") from None
    except OSError as error:
        raise OSError(f"port: expected one that is free, got {port} on {host} ({error.strerror})") from None
