"""Libraries that only some kinds of data need, imported when they do."""

from __future__ import annotations

import importlib
from typing import Any

from alitok_fast._library import install_hint
from alitok_fast.storage.text import first_line


def optional(module: str, purpose: str) -> Any:
    """The module; ImportError says what it is needed for and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        raise ImportError(
            f"data: {purpose} needs {library}, which cannot be imported ({first_line(error)}); {install_hint('data')}"
        ) from error
