"""Serving: requests that arrive at any time, from Python (`Engine`) and over HTTP (`create_app`).

| name | what it is |
|---|---|
| `Engine` | samples what is submitted, from threads and from asyncio, together with whatever else is running |
| `GeneratedImage` | what a request becomes |
| `QueueFullError`, `EngineClosedError` | why a request was not taken |
| `alitok_fast.serving.app.create_app` | the HTTP service (extra `serve`) |
| `alitok_fast.serving.ray.app` | the same service under Ray Serve (extra `ray`) |
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Engine": "alitok_fast.serving.engine",
    "EngineClosedError": "alitok_fast.serving.request",
    "GeneratedImage": "alitok_fast.serving.request",
    "QueueFullError": "alitok_fast.serving.request",
}

__all__ = list(_PUBLIC)  # noqa: PLE0605 - the names that __getattr__ knows


def __getattr__(name: str) -> Any:  # the command line reads the settings without importing torch
    if name not in _PUBLIC:
        raise AttributeError(f"module 'alitok_fast.serving' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
