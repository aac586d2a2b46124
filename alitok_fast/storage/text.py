"""Text from files, users and errors, made fit for a message or a terminal. Nothing here loads torch."""

from __future__ import annotations

import os
import reprlib


def shown(value: object, limit: int = 80) -> str:
    """`value` as text for a message or a terminal: one line of at most `limit` characters, nothing in it a command.

    What comes from a file may hold escape sequences, line breaks, characters that turn the direction of writing, or
    megabytes. Whatever does not print is written as in Python ("\\x1b"), and the end is cut off ("...").
    """
    text = str(value) if isinstance(value, str | os.PathLike) else reprlib.repr(value)
    escaped = []
    for character in text[: limit + 1]:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        escaped.append(character)
    whole = "".join(escaped)
    return whole if len(whole) <= limit else whole[: max(limit - 3, 0)] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
