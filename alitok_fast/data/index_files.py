"""Stored indices of shards: one file for each, beside the shards or elsewhere, compared with its shard before use."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from alitok_fast.data.left_out import LeftOut
from alitok_fast.data.name_table import NameTable
from alitok_fast.data.tar_index import MOST_BYTES, LabelColumn, ShardIndex, index_shard
from alitok_fast.progress import tracked
from alitok_fast.storage.files import write_atomically
from alitok_fast.storage.text import first_line, shown

_log = logging.getLogger(__name__)
FOLDER = ".alitok-index"
_FORMAT = 1
_COLUMNS = ("offsets", "sizes", "numbers", "text_ids")


def index_shards(
    shards: Sequence[Path], label: LabelColumn, image_column: str | None = None, folder: Path | None = None
) -> list[ShardIndex]:
    """The index of each shard: stored ones where they fit, others made and stored in `folder`, or beside the shards.

    A place that cannot be written is warned of once: the index is then made again by the next run.
    """
    settings = {"format": _FORMAT, "label": asdict(label), "image": image_column}
    files = [_index_file(shard, settings, folder) for shard in shards]
    found = {shard: _load(file, shard, settings) for shard, file in zip(shards, files, strict=True)}
    missing = [(shard, file) for shard, file in zip(shards, files, strict=True) if found[shard] is None]
    warned = False
    for shard, file in _shown(missing):
        state = _state(shard)
        index = found[shard] = index_shard(shard, label, image_column)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _store(file, index, {**settings, **state})
        except OSError as error:
            if not warned:
                _log.warning("the index of %s is not kept, name a folder for it (index_folder): %s", shard, error)
            warned = True
    return [index for index in found.values() if index is not None]


def _shown(missing: list[tuple[Path, Path]]) -> Iterable[tuple[Path, Path]]:
    return tracked("index", missing) if len(missing) > 1 else missing


def _state(shard: Path) -> dict[str, int]:
    """What an index is compared with: a shard that was written again has another size or time."""
    stat = os.stat(shard)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _index_file(shard: Path, settings: dict, folder: Path | None) -> Path:
    """Shards of one name from several places, and other choices of columns, have files of their own."""
    place = str(shard.resolve()) if folder else ""
    mark = hashlib.sha256((json.dumps(settings, sort_keys=True) + place).encode("utf-8", "surrogateescape")).hexdigest()
    return (folder or shard.parent / FOLDER) / f"{shard.name}.{mark[:8]}.npz"


def _store(file: Path, index: ShardIndex, settings: dict) -> None:
    left_out = [[*reason, count, index.left_out.names[reason]] for reason, count in index.left_out.counts.items()]
    about = json.dumps({**settings, "left_out": left_out, "damage": index.damage})
    names, ends = index.names.arrays
    texts, text_ends = index.texts.arrays
    arrays = {column: getattr(index, column) for column in _COLUMNS}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            np.savez(stream, about=np.frombuffer(about.encode(), np.uint8), names=names, ends=ends, texts=texts,
                     text_ends=text_ends, **arrays)  # fmt: skip

    write_atomically(file, write)


def _load(file: Path, shard: Path, settings: dict) -> ShardIndex | None:
    """The stored index, None where there is none for the shard as it is now. A damaged one is made again."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if {key: about.get(key) for key in (*settings, "size", "mtime_ns")} != {**settings, **_state(shard)}:
                return None
            columns = [arrays[column] for column in _COLUMNS]
            names = NameTable.from_arrays(arrays["names"], arrays["ends"])
            texts = NameTable.from_arrays(arrays["texts"], arrays["text_ends"])
        index = ShardIndex(columns[0], columns[1], names, columns[2], columns[3], texts, LeftOut(), about["damage"])
        _check(index, about["size"])
        for one, several, count, examples in about["left_out"]:
            index.left_out.restore((str(one), str(several)), int(count), [str(name) for name in examples])
        return index
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise nearly anything on damaged files
        _log.warning("%s: expected the index of a shard, made again, got %s", file, shown(first_line(error)))
        return None


def _check(index: ShardIndex, size: int) -> None:
    """That what is stored lies within a shard of `size` bytes."""
    for column in _COLUMNS:
        array = getattr(index, column)
        if array.dtype != np.int64 or array.shape != (len(index.names),):
            raise ValueError(f"{column} of {array.dtype} {array.shape} for {len(index.names)} samples")
    if not isinstance(index.damage, str):
        raise ValueError(f"damage of type {type(index.damage).__name__}")
    inside = (0 <= index.sizes) & (index.sizes <= MOST_BYTES) & (0 <= index.offsets) & (index.offsets <= size)
    inside &= (index.offsets <= size - index.sizes) & (index.text_ids < len(index.texts))
    if not inside.all():
        raise ValueError("samples beyond the end of the shard")
