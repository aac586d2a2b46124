"""Skip lists: text files that name samples which training leaves out, with the kind of fault of each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from alitok_fast.data.left_out import SKIPPED, LeftOut, Reason
from alitok_fast.storage.files import write_atomically
from alitok_fast.storage.text import first_line, shown

HEADING = "# alitok-fast skip list: kind of fault, a tab, and the sample's name; lines can be taken out"
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


class Named(Protocol):
    """A source whose samples have names and can be left out."""

    left_out: LeftOut

    def __len__(self) -> int: ...

    def sample_name(self, index: int) -> str: ...

    def keep(self, wanted: np.ndarray, reason: Reason) -> None: ...


def write_skip_list(path: Path, source: str, samples: Iterable[tuple[str, str]]) -> None:
    """Write (kind, name) of each sample; `source` is what the data are called."""
    lines = [HEADING, f"# of {shown(source)}", *(f"{kind}\t{_escaped(name)}" for kind, name in samples)]
    text = "".join(line + "\n" for line in lines)
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", "surrogateescape")))


def is_skip_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(HEADING)) == HEADING.encode()


def read_skip_list(path: Path) -> list[str]:
    """The names in a skip list; ValueError names a file that is none, and the line."""
    try:
        lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except OSError as error:
        raise ValueError(f"skip_list: expected a file, got {path} ({first_line(error)})") from error
    if lines[0].rstrip("\r") != HEADING:
        raise ValueError(f"skip_list: expected a list by `alitok-fast data check`, got {path}")
    names = []
    for number, line in enumerate(lines, 1):
        kind, tab, name = line.rstrip("\r").partition("\t")
        if not line.strip() or line.startswith("#"):
            continue
        if not tab or not name:
            raise ValueError(f"{path}: expected a kind, a tab and a name in line {number}, got {shown(line)!r}")
        names.append(_unescaped(name))
    return names


def skip_samples(source: Named, path: Path) -> None:
    """Leave out the samples that the list names, and let those that were left out already rest.

    ValueError where it names some, and none of this source.
    """
    names = set(read_skip_list(path))
    settled = source.left_out.settle(names)
    wanted = np.array([source.sample_name(index) not in names for index in range(len(source))], bool)
    if names and wanted.all() and len(source) and not settled:
        raise ValueError(
            f"skip_list: expected names of these data, such as {shown(source.sample_name(0))!r}, got others in {path}, "
            f"such as {shown(min(names))!r}"
        )
    source.keep(wanted, SKIPPED)


def _escaped(name: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in name)


def _unescaped(name: str) -> str:
    parts = name.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\r", "\r") for part in parts)
