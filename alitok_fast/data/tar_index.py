"""Where the samples of a webdataset shard are: found by one pass over a tar file's headers, and stored as an index.

Nothing is ever extracted: names in a shard are keys, not paths. A shard is somebody's file, and so is an index: each
offset and size is compared with the shard before it is believed.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alitok_fast.data.labels import NONSENSE, NOTHING, label_number
from alitok_fast.data.left_out import (
    HIDDEN,
    NO_PICTURE,
    OTHER_FILES,
    OUTSIDE,
    REPEATED,
    SPECIAL,
    TOO_LARGE,
    LeftOut,
    is_junk,
)
from alitok_fast.data.name_table import NameTable
from alitok_fast.data.optional import optional
from alitok_fast.data.pictures import picture_suffixes
from alitok_fast.storage.text import first_line, shown

MOST_BYTES = 1 << 29  # of one picture, which is read as a whole
_MOST_LABEL = {"cls": 64, "txt": 800, "json": 1 << 20}  # bytes of a label's member; a longer one is a caption or worse
_MOST_NAME = 200  # characters of a class name
_END = 1 << 16  # bytes after the end of the archive that are looked at


@dataclass(frozen=True)
class LabelColumn:
    """Which member of a sample has its label: "cls" (a number), "txt" (a name), "json" with a key in it, or "none";
    None takes the first of cls, json and txt that the sample has."""

    member: str | None = None
    key: str = "label"

    @classmethod
    def named(cls, name: str | None) -> LabelColumn:
        """Of "cls", "txt", "json", "json.KEY", "none" or None; ValueError for anything else."""
        member, _, key = (name or "").partition(".")
        if name is not None and (member not in ("cls", "txt", "json", "none") or (key and member != "json")):
            raise ValueError(
                f"label_column: expected 'cls', 'txt', 'json', 'json.KEY' or 'none' for shards, got {name!r}"
            )
        return cls(member or None, key or "label")

    def members(self) -> tuple[str, ...]:
        """Suffixes of the members that may have the label, the first that is there counts."""
        return ("cls", "json", "txt") if self.member is None else () if self.member == "none" else (self.member,)


@dataclass
class ShardIndex:
    """The samples of one shard: where their pictures are, and their labels, as `number_labels` takes them.

    offsets, sizes (n,) int64 of the pictures' bytes; names (n,) of their members; numbers (n,) and text_ids (n,)
    int64; texts; what was left out; and how the shard is damaged, empty if it is whole.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    names: NameTable
    numbers: np.ndarray
    text_ids: np.ndarray
    texts: NameTable
    left_out: LeftOut
    damage: str = ""

    def __len__(self) -> int:
        return len(self.offsets)


def index_shard(path: Path, label: LabelColumn, image_column: str | None = None) -> ShardIndex:
    """Read the headers of a tar file once. A shard that ends too early, or in nonsense, is indexed up to there."""
    left_out, damage = LeftOut(), ""
    rows: list[tuple[int, int, str, int, int]] = []
    texts: dict[str, int] = {}
    with path.open("rb") as file:
        reader = _Samples(file, os.fstat(file.fileno()).st_size, path.name, left_out)
        try:
            for members in reader:
                picture = _picture(members, image_column, left_out, path.name)
                if picture is not None:
                    number, text = _label(file, members, label)
                    text_id = texts.setdefault(text, len(texts)) if text else NOTHING
                    rows.append((picture.offset_data, picture.size, picture.name, number, text_id))
        except Exception as error:  # on damaged headers tarfile raises nearly anything
            damage = f"{type(error).__name__}: {first_line(error)}"
    offsets, sizes, names, numbers, text_ids = zip(*rows, strict=True) if rows else ((),) * 5
    columns = [np.array(column, np.int64) for column in (offsets, sizes, numbers, text_ids)]
    return ShardIndex(
        columns[0], columns[1], NameTable(names), columns[2], columns[3], NameTable(texts), left_out, damage
    )


class _Samples:
    """The samples of a tar file: lists of members that follow each other and have the same key (webdataset's rule)."""

    def __init__(self, file: io.BufferedReader, size: int, shard: str, left_out: LeftOut) -> None:
        self._file, self._size, self._shard, self._left_out = file, size, shard, left_out

    def __iter__(self) -> Iterator[dict[str, tarfile.TarInfo]]:
        """Members by suffix in lower case. ValueError where the archive is not whole, after the samples before."""
        key_and_suffix = optional("webdataset.tariterators", "an index of shards").base_plus_ext
        current, sample = None, dict[str, tarfile.TarInfo]()
        for member in self._members():
            key, suffix = key_and_suffix(member.name)
            if key is None or not self._is_data(member):
                continue
            if key != current and sample:
                yield sample
                sample = {}
            current = key
            if suffix.lower() in sample:
                self._left_out.add(REPEATED, f"{self._shard}/{member.name}")
            else:
                sample[suffix.lower()] = member
        if sample:
            yield sample
        self._check_end()

    def _members(self) -> Iterator[tarfile.TarInfo]:
        before = -1
        with tarfile.open(fileobj=_Bounded(self._file, self._size), mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                end = member.offset_data + (0 if member.issparse() else member.size)  # a sparse one is larger unpacked
                if member.offset <= before or member.size < 0 or end > self._size:
                    raise ValueError(f"{shown(member.name)!r} goes beyond the end of the file")
                before = member.offset
                archive.members.clear()  # tarfile would keep them all
                yield member
            self._end = archive.offset

    def _is_data(self, member: tarfile.TarInfo) -> bool:
        parts, reason = member.name.split("/"), None
        if member.isdir():
            return False
        if ".." in parts or member.name.startswith("/"):
            reason = OUTSIDE
        elif any(is_junk(part) for part in parts if part not in ("", ".")):
            reason = HIDDEN
        elif not member.isreg() or member.issparse():
            reason = SPECIAL
        if reason is not None:
            self._left_out.add(reason, f"{self._shard}/{member.name}")
        return reason is None

    def _check_end(self) -> None:
        """tarfile takes a damaged header, or the end of the file, for the end of the archive."""
        self._file.seek(self._end)
        rest = self._file.read(_END)
        if not rest:
            raise ValueError("no end of the archive: the file is cut short")
        if rest.strip(b"\0"):
            raise ValueError(f"no header at byte {self._end}: damaged, or several archives in one file")


class _Bounded:
    """A file for tarfile that never reads, nor takes memory, beyond its end, whatever size a header asks for."""

    def __init__(self, file: io.BufferedReader, size: int) -> None:
        self._file, self._size, self.seek, self.tell = file, size, file.seek, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._size - self._file.tell())))


def _picture(
    members: dict[str, tarfile.TarInfo], image_column: str | None, left_out: LeftOut, shard: str
) -> tarfile.TarInfo | None:
    """The first picture of a sample, or the member that `image_column` names; further pictures are counted."""
    if image_column:
        found = [suffix for suffix in members if suffix == image_column.lower()]
    else:
        found = [suffix for suffix in members if f".{suffix}" in picture_suffixes()]
    for suffix in found[1:]:
        left_out.add(REPEATED, f"{shard}/{members[suffix].name}")
    if not found:
        reason = OTHER_FILES if len(members) == 1 else NO_PICTURE
        left_out.add(reason, f"{shard}/{next(iter(members.values())).name}")
        return None
    picture = members[found[0]]
    if picture.size > MOST_BYTES:
        left_out.add(TOO_LARGE, f"{shard}/{picture.name}")
        return None
    return picture


def _label(file: io.BufferedReader, members: dict[str, tarfile.TarInfo], column: LabelColumn) -> tuple[int, str]:
    """A sample's label: a number, or NOTHING and a text; NOTHING and no text where it has none."""
    for name in column.members():
        if name not in members:
            continue
        member = members[name]
        if member.size > _MOST_LABEL[name]:
            return NONSENSE, ""
        try:
            text = os.pread(file.fileno(), member.size, member.offset_data).decode("utf-8").strip()
            value = json.loads(text) if name == "json" else text
        except (ValueError, RecursionError):
            return NONSENSE, ""
        if name == "json":
            if not isinstance(value, dict) or value.get(column.key) is None:
                continue
            value = value[column.key]
        number = label_number(value)
        if number != NONSENSE or name == "cls" or not isinstance(value, str):
            return number, ""
        one_line = 0 < len(value) <= _MOST_NAME and value.isprintable()
        return (NOTHING, unicodedata.normalize("NFC", value)) if one_line else (NONSENSE, "")
    return NOTHING, ""
