"""Webdataset shards: pictures in tar files, read where they are, in any order."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from alitok_fast.data.encoded import EncodedImages
from alitok_fast.data.index_files import index_shards
from alitok_fast.data.labels import ClassFile, number_labels
from alitok_fast.data.left_out import DAMAGED, SHARDS, SPLIT_NAMES, LeftOut, is_junk
from alitok_fast.data.name_table import NameTable
from alitok_fast.data.optional import optional
from alitok_fast.data.pictures import UnreadableImageError, picture_suffixes
from alitok_fast.data.tar_index import LabelColumn, ShardIndex
from alitok_fast.storage.text import shown

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MOST_OPEN = 64  # shards at the same time, in each process
_MOST_CAPTIONS = 1000  # as many different texts, on more than half of the samples, are no classes


def is_pattern(path: str) -> bool:
    """Whether a path names shards: a tar file, or several by braces, as in imagenet-{000000..000146}.tar."""
    return path.endswith((".tar", *_COMPRESSED)) or ("{" in path and ".tar" in path)


def holds_shards(folder: Path) -> bool:
    """Whether a folder is one of shards, or has splits that are. Tar files beside folders of pictures (ImageNet's own
    archives beside what they hold) are none; ValueError where pictures lie among them."""
    folders = _folders(folder)
    if not (_shards_in(folder) or any(map(_shards_in, folders))):
        return False
    if any(next(_pictures(place), None) for place in folders):
        return False
    if loose := [name for name in os.listdir(folder) if _is_picture(name)]:
        raise ValueError(
            f"data: expected pictures or shards in {folder}, got both (such as {shown(min(loose))!r}); name the shards "
            "with braces (x-{000..146}.tar), or move them"
        )
    return True


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry) for entry in entries if entry.is_dir() and not is_junk(entry.name))


def _pictures(folder: Path) -> Iterator[str]:
    """Names of pictures at any depth. The first one comes soon where there are many."""
    for _, _, names in os.walk(folder):
        yield from filter(_is_picture, names)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in picture_suffixes() and not is_junk(name)


class ShardImages(EncodedImages):
    """The samples of webdataset shards that have a picture, by index: `path` is a tar file, a folder, or braces.

    A sample is a run of members with the same key (webdataset's rule). Its label is a number in a member .cls, or
    "label" in .json, or a class name in .txt; `label_column` chooses one of "cls", "txt", "json", "json.KEY" or
    "none", `image_column` a picture by its suffix. `classes` gives numbers their names, and names their order, which
    without it is that of all splits together. Shards with train, val, ... in their names or folders are splits.
    An index of all samples is made once (`index_folder`; beside the shards, if not given).
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        classes: ClassFile | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        index_folder: Path | None = None,
        **reading,
    ) -> None:
        label, left_out = LabelColumn.named(label_column), LeftOut()
        chosen, others = _split(path, split, left_out)
        indices = index_shards([*chosen, *others], label, image_column, index_folder)
        names, labels, wrong = _numbered(indices, classes, path)
        indices = indices[: len(chosen)]
        count = sum(map(len, indices))
        self._shards, self._handles = chosen, _Handles()
        self._first = np.cumsum([0, *map(len, indices)])
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._members = NameTable.joined([index.names for index in indices])
        for shard, index in zip(chosen, indices, strict=True):
            for reason, number in index.left_out.counts.items():
                left_out.restore(reason, number, index.left_out.names[reason])
            if index.damage:
                left_out.add(DAMAGED, shard.name, index.damage)
        folder = Path(path)
        name = f"{folder.name}/{split}" if others or (folder / split).is_dir() else folder.name
        super().__init__(name, names or [folder.name], labels[:count], left_out, **reading)
        self.keep_labelled({reason: mask[:count] for reason, mask in wrong.items()})

    def encoded(self, index: int) -> bytes:
        row = int(self._rows[index])
        offset, size = int(self._offsets[row]), int(self._sizes[row])
        try:
            data = self._handles.read(self._shards[self._shard(row)], offset, size)
        except OSError as error:
            raise UnreadableImageError(f"{self.location(index)}: expected a readable shard, got {error}") from error
        if len(data) < size:
            raise UnreadableImageError(
                f"{self.location(index)}: expected {size} bytes, got {len(data)}: the shard was cut short meanwhile"
            )
        return data

    def sample_name(self, index: int) -> str:
        row = int(self._rows[index])
        return f"{self._shards[self._shard(row)].name}/{self._members[row]}"

    def location(self, index: int) -> str:
        row = int(self._rows[index])
        return f"{self._shards[self._shard(row)]}: {shown(self._members[row], limit=1000)}"

    def entries(self) -> Iterator[bytes]:
        yield repr([shard.name for shard in self._shards]).encode("utf-8", "surrogateescape")
        for array in (self._first, *self._members.arrays, self._sizes, self._rows, self.labels):
            yield array.tobytes()

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self._first, row, side="right")) - 1


class _Handles:
    """Shards that are open in this process. They are read with pread, which shares no offset with a forked process."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):  # open files and locks belong to their process
        return _Handles, ()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        handle = self._handle(path)
        data = os.pread(handle.number, size, offset)
        while 0 < len(data) < size and (more := os.pread(handle.number, size - len(data), offset + len(data))):
            data += more
        return data

    def _handle(self, path: Path) -> _Handle:
        with self._lock:
            handle = self._open.pop(path, None) or _Handle(path)
            self._open[path] = handle
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)  # closed when the last thread that reads from it is done
            return handle


class _Handle:
    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _numbered(indices: Sequence[ShardIndex], classes: ClassFile | None, where: str):
    """`number_labels` of all samples; the same text has one number in all shards."""
    texts = sorted({text for index in indices for text in index.texts})
    order = {text: number for number, text in enumerate(texts)}
    count = sum(map(len, indices))
    if classes is None and len(texts) > max(_MOST_CAPTIONS, count // 2):
        raise ValueError(
            f"label_column: expected class names, got {len(texts)} different texts on {count} samples (such as "
            f"{shown(texts[0])!r}) in {where}; captions are no classes: choose another member, or 'none'"
        )
    ids = []
    for index in indices:
        own = np.array([order[text] for text in index.texts] + [-1], np.int64)
        ids.append(own[np.maximum(index.text_ids, -1)])
    numbers = np.concatenate([index.numbers for index in indices])
    return number_labels(numbers, texts, np.concatenate(ids), classes, where)


# ---- names and splits ----


def _split(path: str, split: str, left_out: LeftOut) -> tuple[list[Path], list[Path]]:
    """The shards of a split, and those of the others, which share its classes. What `path` names is one split."""
    folder = Path(path)
    if not folder.is_dir():
        shards = _expanded(path)
        named = {_split_of(shard) for shard in shards}
        if split != "train" and split not in named:
            raise ValueError(f"split: expected 'train', since {path} names its shards, got {split!r}")
        return shards, []
    parts: dict[str, list[Path]] = {}
    for place in [folder, *_folders(folder)]:
        for shard in _shards_in(place):
            parts.setdefault(_split_of(shard) if place == folder else place.name, []).append(shard)
    if set(parts) == {""}:
        if split != "train":
            raise ValueError(f"split: expected 'train', since {folder} holds no splits, got {split!r}")
        return parts[""], []
    for shard in parts.pop("", []):
        left_out.add(SHARDS, shard)
    if split not in parts:
        known = ", ".join(map(repr, sorted(parts)))
        raise ValueError(f"split: expected one of {known}, the splits in {folder}, got {split!r}")
    return parts[split], [shard for name, shards in parts.items() if name != split for shard in shards]


def _split_of(shard: Path) -> str:
    """The split that a shard's name says: imagenet1k-validation-07.tar; empty where it says none."""
    return next((word for word in re.findall("[a-z]+", shard.name.lower()) if word in SPLIT_NAMES), "")


def _shards_in(folder: Path) -> list[Path]:
    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar") and not is_junk(name))
    return [folder / name for name in names if (folder / name).is_file()]


def _count(shards: list[Path]) -> str:
    return "1 shard" if len(shards) == 1 else f"{len(shards)} shards"


def _expanded(pattern: str) -> list[Path]:
    """The shards that a name or braces stand for, each once; ValueError for those that are not there, or packed."""
    names = [pattern]
    if "{" in pattern:
        names = optional("webdataset.shardlists", "a name with braces").expand_urls(pattern)
    shards = [Path(name) for name in dict.fromkeys(names)]
    packed = [shard for shard in shards if shard.name.endswith(_COMPRESSED)]
    if packed:
        raise ValueError(
            f"data: expected tar files, which can be read in any order, got {packed[0]}; unpack it (gzip -d)"
        )
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(f"data: expected {_count(shards)} in {pattern}, got no file {missing[0]}")
    return shards
