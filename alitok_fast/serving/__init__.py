"""Serving: requests that arrive at any time, from Python (`Engine`) and over HTTP (`create_app`).

| name | what it is |
|---|---|
| `Engine` | samples what is submitted, from threads and from asyncio, together with whatever else is running |
| `GeneratedImage` | what a request becomes |
| `QueueFullError`, `EngineClosedError` | why a request was not taken |
| `alitok_fast.serving.app.create_app` | the HTTP service (extra `serve`) |
| `alitok_fast.serving.ray.app` | the same service under Ray Serve (extra `ray`) |
"""

from alitok_fast.serving.engine import Engine
from alitok_fast.serving.request import EngineClosedError, GeneratedImage, QueueFullError

__all__ = ["Engine", "EngineClosedError", "GeneratedImage", "QueueFullError"]
