"""`shown`: what comes from a file, for a message or a terminal."""

from __future__ import annotations

import pytest

from alitok_fast.storage.text import shown


@pytest.mark.parametrize(
    "value, expected",
    [
        ("ankle boot", "ankle boot"),
        ("Käse 猫 🐈", "Käse 猫 🐈"),
        ("\x1b]0;owned\x07\x1b[2J", r"\x1b]0;owned\x07\x1b[2J"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\u202eevil", r"\u202eevil"),  # turns the direction of writing
        ("\x9b31m", r"\x9b31m"),  # an escape sequence of one byte
        ("\ud800", r"\ud800"),
        ("\u2028", r"\u2028"),
        (None, "None"),
        ({"a": "\x1b"}, r"{'a': '\x1b'}"),
        ("", ""),
    ],
)
def test_text(value, expected):
    assert shown(value) == expected
    shown(value).encode()


@pytest.mark.parametrize("limit", [3, 10, 80])
def test_length(limit):
    for text in ("x" * limit, "x" * (limit + 1), "\x1b" * limit, "x" * 10**6, ["x" * 10**6] * 10**4):
        assert len(shown(text, limit)) <= limit
    assert shown("x" * limit, limit) == "x" * limit
    assert shown("x" * (limit + 1), limit).endswith("...")
