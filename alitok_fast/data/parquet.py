"""Token caches that are published as parquet files, read into a cache folder.

The rows are read twice: labels (and the images that crops belong to) first, which tells how many images there are, then
the tokens, a piece at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from alitok_fast.data.cache_writer import fill_cache, writer_lock
from alitok_fast.data.parquet_facts import (
    ParquetColumns,
    TokenFacts,
    exported_cache,
    hub_class_names,
    row_layout,
    sizes_of_images,
)
from alitok_fast.data.parquet_table import ParquetFile, RowGroup, find_parquet
from alitok_fast.data.token_cache import TokenCache, TokenCacheMeta, validate_token_cache
from alitok_fast.storage.files import differences

_MOST_CLASSES = 1 << 24


def import_parquet(
    paths: Sequence[str | Path],
    out: str | Path,
    columns: ParquetColumns | None = None,
    facts: TokenFacts | None = None,
    force: bool = False,
    progress: Callable[[Iterable], Iterable] = iter,
) -> TokenCache:
    """Read parquet files (files, patterns or folders) into the token cache `out`, or go on doing so.

    The column of tokens holds whole numbers in lists: (crops, N), (crops * N), or (N) with one row per crop. Files that
    `export_parquet` wrote need no more; of others, sizes that neither `facts` nor the tokens tell are those of the
    published tokenizer with as many tokens, class names those of a Hugging Face data set, else numbers.

    Raises ImportError without pyarrow, ValueError naming file, row group and column where a value is missing or is not
    what it should be, and as `write_token_cache` where `out` is something else, which `force` writes over.
    """
    files = [ParquetFile(path) for path in find_parquet(paths)]
    facts = facts or TokenFacts()
    meta, exported_columns, files = exported_cache(files)
    if meta is not None:
        facts = _confirmed(facts, meta, files[0].path)
    table = _Table(files, columns or exported_columns or ParquetColumns())
    names = facts.class_names or hub_class_names(files[0], table.columns.label)
    labels, rows = table.labels(len(names) if names else _MOST_CLASSES)
    num_crops, num_tokens = row_layout(table.cell, rows, table.columns, facts)
    if meta is None:
        folder = Path(paths[0]) if Path(paths[0]).is_dir() else files[0].path.parent
        image_size, codebook_size = sizes_of_images(num_tokens, facts)
        meta = TokenCacheMeta(
            num_images=len(labels),
            num_crops=num_crops,
            num_tokens=num_tokens,
            codebook_size=codebook_size,
            image_size=image_size,
            class_names=list(names or map(str, range(int(labels.max()) + 1))),
            source=folder.resolve().name if facts.source is None else facts.source,
            tokenizer=facts.tokenizer or "",
            data=table.fingerprint(labels),
        )
    pieces = table.pieces(meta, rows, progress)
    with writer_lock(out):
        fill_cache(out, meta, labels, pieces, force)
    return validate_token_cache(out)


def _confirmed(facts: TokenFacts, meta: TokenCacheMeta, path: Path) -> TokenFacts:
    """What the metadata in exported files say; ValueError where `facts` say otherwise."""
    said = {field.name: getattr(facts, field.name) for field in fields(facts)}
    known = {name: getattr(meta, name) for name in said}
    if wrong := differences(known, known | {name: value for name, value in said.items() if value is not None}):
        raise ValueError(f"{wrong[0]} ({path} holds the metadata of its cache)")
    return TokenFacts(**known)


class _Table:
    """The row groups of all files, and the shape `cell` of a row's tokens, which is that of the first."""

    def __init__(self, files: list[ParquetFile], columns: ParquetColumns) -> None:
        for file in files:
            for name in ("tokens", "label", "image"):
                if getattr(columns, name) is not None:
                    file.check_column(f"{name}_column", getattr(columns, name))
        self._files, self.columns = files, columns
        self._groups = [(file, group) for file in files for group in file.groups if group.rows]
        if not self._groups:
            raise ValueError(f"parquet: expected at least one row, got none in {files[0].path}")
        file, group = self._groups[0]
        self.cell = next(file.lists(group, columns.tokens))[1].shape[1:]

    def fingerprint(self, labels: np.ndarray) -> str:
        digest = hashlib.sha256(b"".join(file.fingerprint() for file in self._files))
        digest.update(np.ascontiguousarray(labels, np.int64).data)
        digest.update(repr(self.columns).encode())
        return digest.hexdigest()[:16]

    def labels(self, classes: int) -> tuple[np.ndarray, int]:
        """The label of each image, (images,) int64 below `classes`, and how many rows each image has."""
        columns, found = self.columns, []
        images = _Images(columns)
        for file, group in self._groups:
            labels = file.scalars(group, columns.label)
            _require_below(group, columns.label, 0, labels, classes)
            found.append(labels.astype(np.int64))
            if columns.image is not None:
                images.add(group, file.scalars(group, columns.image, integers=False), labels)
        return (np.concatenate(found), 1) if columns.image is None else images.finish(self._groups[-1][1])

    def pieces(
        self, meta: TokenCacheMeta, rows: int, progress: Callable[[Iterable], Iterable]
    ) -> Callable[[int], Iterator[np.ndarray]]:
        """The tokens as `fill_cache` takes them; each image has `rows` rows."""

        def read(done: int) -> Iterator[np.ndarray]:
            skip, rest = done * rows, np.empty((0, meta.num_crops * meta.num_tokens // rows), meta.dtype)
            for file, group in progress(self._groups):
                if skip < group.rows:
                    for row, cells in file.lists(group, self.columns.tokens, skip):
                        if cells.shape[1:] != self.cell:
                            expected = f"lists of {self.cell} as in the first row"
                            raise group.error(self.columns.tokens, expected, f"{cells.shape[1:]} in row {row}")
                        _require_below(group, self.columns.tokens, row, cells, meta.codebook_size)
                        rest = np.concatenate([rest, cells.reshape(len(cells), -1).astype(meta.dtype)])
                        whole = len(rest) // rows * rows
                        if whole:
                            yield rest[:whole].reshape(-1, meta.num_crops, meta.num_tokens)
                        rest = rest[whole:]
                skip = max(0, skip - group.rows)

        return read


class _Images:
    """Images whose crops are rows that follow one another."""

    def __init__(self, columns: ParquetColumns) -> None:
        self._image, self._label = columns.image or "", columns.label
        self._rows: dict[Any, int] = {}
        self._labels: list[int] = []
        self._last: Any = None

    def add(self, group: RowGroup, images: np.ndarray, labels: np.ndarray) -> None:
        """The next rows: which image each is of, and its label."""
        borders = [0, *(np.flatnonzero(images[1:] != images[:-1]) + 1).tolist(), len(images)]
        for (begin, end), image in zip(pairwise(borders), images[borders[:-1]].tolist(), strict=True):
            if not self._rows or image != self._last:
                self._close(group)
                if image in self._rows:
                    expected = "the rows of an image one after the other"
                    raise group.error(self._image, expected, f"image {image!r} again in row {begin}")
                self._rows[image], self._last = 0, image
                self._labels.append(int(labels[begin]))
            self._rows[image] += end - begin
            if other := set(labels[begin:end].tolist()) - {self._labels[-1]}:
                expected = f"one label for image {image!r}"
                raise group.error(self._label, expected, f"{self._labels[-1]} and {other.pop()}")

    def _close(self, group: RowGroup) -> None:
        if self._rows and self._rows[self._last] != (first := next(iter(self._rows.values()))):
            expected = f"{first} rows of each image, as of the first"
            raise group.error(self._image, expected, f"{self._rows[self._last]} of image {self._last!r}")

    def finish(self, group: RowGroup) -> tuple[np.ndarray, int]:
        self._close(group)
        return np.array(self._labels, np.int64), next(iter(self._rows.values()))


def _require_below(group: RowGroup, column: str, row: int, values: np.ndarray, limit: int) -> None:
    """That values, one row each from number `row` on, are from 0 to `limit` - 1."""
    smallest, largest = int(values.min()), int(values.max())
    if smallest < 0 or largest >= limit:
        wrong = smallest if smallest < 0 else largest
        at = row + int(np.argwhere(values == wrong)[0][0])
        raise group.error(column, f"0 to {limit - 1}", f"{wrong} in row {at}")
