"""TOML for files that users write: read with one clear error, written as plain tables. Nothing here loads torch."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alitok_fast.storage.text import first_line, shown

LARGEST = 2**16  # bytes
LONGEST = 2**13  # characters of a line: the parser takes the square of the parts of a dotted key


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ValueError in one line that names the file, OSError where it cannot be read."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path}: expected TOML of at most {LARGEST} bytes, got {size} bytes")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected TOML in UTF-8, got {first_line(error)}") from None
    if any(len(line) > LONGEST for line in text.splitlines()):
        raise ValueError(f"{path}: expected lines of at most {LONGEST} characters, got a longer one")
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected TOML, got {error}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises ValueError in one line."""
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        tomllib = importlib.import_module(name)
    except ImportError:
        from alitok_fast._library import install_hint

        raise ImportError(f"TOML files need tomli on Python 3.10: {install_hint('train')}") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("tables or lists too deep inside each other") from None
    except ValueError as error:
        raise ValueError(shown(first_line(error), limit=200)) from None


def toml_value(value: Any) -> str:
    """A bool, a number, a text, or a list of them, as TOML writes it. Raises ValueError for what TOML does not hold."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"expected text that UTF-8 holds, got {shown(value)}") from None
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's other escapes are TOML's too
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    raise ValueError(f"expected a bool, a number, a text or a list, got {type(value).__name__}")


def toml_lines(values: Mapping[str, Any]) -> list[str]:
    """One line for each value, whose name is a bare key."""
    return [f"{name} = {toml_value(value)}" for name, value in values.items()]
