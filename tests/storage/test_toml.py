"""TOML: values come back as they went, and files that are none are one line naming the file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alitok_fast.storage.toml import LARGEST, LONGEST, parse_toml, read_toml, toml_lines, toml_value

VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)


@given(st.one_of(VALUES, st.lists(VALUES), st.lists(st.lists(VALUES))))
def test_values_come_back(value) -> None:
    found = parse_toml("\n".join(toml_lines({"name": value})))["name"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, "\ud800", None, {}, b"x", ["\udfff"]])
def test_what_toml_does_not_hold_is_refused(value) -> None:
    with pytest.raises(ValueError, match="expected .*, got"):
        toml_value(value)


HOSTILE = {
    "nested lists": b"a = " + b"[" * 30_000,
    "nested tables": b"a = " + b"{a = " * 1_600,
    "a megabyte of nesting": b"a = " + b"[" * 500_000 + b"]" * 500_000,
    "many long dotted keys": b"\n".join(b"k%d" % i + b".a" * 4_000 + b" = 1" for i in range(8)) + b"\nb",
    "one long dotted key": b"a" + b".a" * 30_000 + b" = 1",
    "twice the same key": b"[model]\nwidth = 1\nwidth = 2\n",
    "twice the same section": b"[model]\n[model]\n",
    "UTF-16": "[model]\nwidth = 1\n".encode("utf-16"),
    "latin-1": "[data]\npath = 'caf\xe9'\n".encode("latin-1"),
    "zeros": b"\0" * 100,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "JSON": b'{"model": {"width": 1}}',
    "a long number": b"a = " + b"9" * 8_000,
    "an escape sequence": b"[model]\n\x1b[2J = 1\n",
    "not closed": b'a = "x',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_one_line_that_names_them(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_toml(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: expected ") and len(message.splitlines()) == 1 and len(message) < 500
    assert message.isprintable()


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes("\ufeff[model]\r\nwidth = 1\r\n".encode())
    assert read_toml(file) == {"model": {"width": 1}}


def test_sizes_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b"#" * LARGEST + b"\n")
    with pytest.raises(ValueError, match=f"expected TOML of at most {LARGEST} bytes, got {LARGEST + 1} bytes"):
        read_toml(file)
    file.write_bytes(b"#" * (LONGEST + 1) + b"\n")
    with pytest.raises(ValueError, match=f"expected lines of at most {LONGEST} characters"):
        read_toml(file)
