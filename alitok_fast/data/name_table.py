"""Millions of names in two arrays: little to keep, to pickle, and to share between processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np


class NameTable(Sequence[str]):
    """A list of strings that is never changed, as UTF-8 in one array and the end of each in another.

    A list of a million strings costs 100 MB, a second to pickle, and a copy in each forked process, whose count of
    references it changes; this costs their length.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text: np.ndarray = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        begin, end = self._ends[index % len(self)], self._ends[index % len(self) + 1]
        return self._text[begin:end].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(bytes,) uint8 and (names + 1,) int64, from which `from_arrays` makes the table again."""
        return self._text, self._ends

    @classmethod
    def from_arrays(cls, text: np.ndarray, ends: np.ndarray) -> NameTable:
        """ValueError where the arrays are no table."""
        whole = text.dtype == np.uint8 and ends.dtype == np.int64 and text.ndim == ends.ndim == 1
        if not (whole and len(ends) and ends[0] == 0 and ends[-1] == len(text) and (np.diff(ends) >= 0).all()):
            raise ValueError(f"names: expected a table of {len(text)} bytes, got ends that do not fit")
        table = cls()
        table._text, table._ends = text, ends
        return table

    @classmethod
    def joined(cls, tables: Sequence[NameTable]) -> NameTable:
        """One table after the other."""
        table = cls()
        if tables:
            lengths = [np.diff(one._ends) for one in tables]
            table._text = np.concatenate([one._text for one in tables])
            table._ends = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        return table
