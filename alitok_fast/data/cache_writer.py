"""Writing a token cache: space reserved first, earlier work checked before it is continued, links never followed."""

from __future__ import annotations

import dataclasses
import logging
import os
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from alitok_fast.data.checks import require_choice, require_count
from alitok_fast.data.reading import default_workers, read_ahead
from alitok_fast.data.sources import ImageSource, check_picture, check_source
from alitok_fast.data.token_cache import (
    LABELS_NAME,
    META_NAME,
    PROGRESS_NAME,
    TOKENS_NAME,
    TokenCacheMeta,
    checked_meta,
    npy_header,
    read_meta,
    token_dtype,
)
from alitok_fast.data.transforms import CROP_COUNTS, cache_crops, to_tensor
from alitok_fast.storage.files import differences, leftovers, locked, read_json, write_json
from alitok_fast.storage.images import write_npy

_log = logging.getLogger(__name__)
PARTIAL_NAME, LOCK_NAME = "tokens.partial.npy", ".tokenize.lock"
_NAMES = (META_NAME, PROGRESS_NAME, TOKENS_NAME, LABELS_NAME, PARTIAL_NAME)
_BATCHES_PER_BLOCK = 16  # a block is flushed and entered in the progress file with its checksum


def write_token_cache(
    folder: str | Path,
    source: ImageSource,
    encode: Callable[[Tensor], Tensor],
    meta: TokenCacheMeta,
    batch_size: int = 64,
    progress: Callable[[Iterable], Iterable] = iter,
    workers: int | None = None,
    force: bool = False,
) -> None:
    """Encode every image of `source` (see data.sources) into `folder`; continue an interrupted run.

    `encode` takes (B, 3, S, S) in [0, 1] and gives (B, N) int64. Pictures are read by `workers` threads, one batch
    ahead. Raises ValueError when tokens out of range come back, when another process writes into the folder, when it
    holds a cache of other images or settings, or files under the cache's names that no cache wrote (`force` removes
    all of these first and begins anew); OSError naming the file when the disk is full, before anything is encoded.
    """
    require_count("batch_size", batch_size)
    workers = default_workers() if workers is None else require_count("workers", workers)
    require_choice("num_crops", meta.num_crops, CROP_COUNTS)
    check_source(source)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK_NAME):
        for file in leftovers(folder, _NAMES):
            file.unlink()
        blocks = _begun(folder, meta, force)
        if blocks is None:
            return
        with _PartialTokens(folder, meta, blocks) as partial:
            _encode_all(source, encode, meta, partial, batch_size, progress, workers)
        write_npy(folder / LABELS_NAME, np.asarray(source.labels, np.int64))
        os.replace(folder / PARTIAL_NAME, folder / TOKENS_NAME)
        write_json(folder / META_NAME, dataclasses.asdict(meta))
        (folder / PROGRESS_NAME).unlink(missing_ok=True)


def _encode_all(source, encode, meta, partial, batch_size, progress, workers) -> None:
    firsts = range(partial.done, meta.num_images, batch_size)

    def crops_of(index: int) -> np.ndarray:
        return cache_crops(check_picture(source.image(index), index), meta.image_size, meta.num_crops)

    batches = (range(first, min(first + batch_size, meta.num_images)) for first in firsts)
    read = read_ahead(batches, crops_of, workers)
    for number, (_, crops) in enumerate(zip(progress(firsts), read, strict=True), 1):
        images: np.ndarray = np.concatenate(crops)
        found = encode(to_tensor(images))
        smallest, largest = int(found.min()), int(found.max())
        if found.shape != (len(images), meta.num_tokens) or smallest < 0 or largest >= meta.codebook_size:
            raise ValueError(
                f"encode: expected ({len(images)}, {meta.num_tokens}) tokens below {meta.codebook_size}, "
                f"got shape {tuple(found.shape)} in {smallest}..{largest}"
            )
        partial.append(found.cpu().numpy().reshape(-1, meta.num_crops, meta.num_tokens))
        if number % _BATCHES_PER_BLOCK == 0:
            partial.enter()
    partial.enter()


class _PartialTokens:
    """tokens.partial.npy, written from the front, and progress.json: up to which image, with which checksums."""

    def __init__(self, folder: Path, meta: TokenCacheMeta, blocks: list[list[int]]) -> None:
        self._path, self._progress_file, self._meta = folder / PARTIAL_NAME, folder / PROGRESS_NAME, meta
        self._dtype = token_dtype(meta.codebook_size)
        self._header = npy_header((meta.num_images, meta.num_crops, meta.num_tokens), self._dtype)
        self._row = meta.num_crops * meta.num_tokens * self._dtype.itemsize
        self._handle, self._blocks = self._open(blocks)
        self.done = self._blocks[-1][0] if self._blocks else 0
        self._checksum = 0

    def __enter__(self) -> _PartialTokens:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._handle)

    def append(self, tokens: np.ndarray) -> None:
        data = tokens.astype(self._dtype).tobytes()
        self._write(data, len(self._header) + self.done * self._row)
        self._checksum = zlib.crc32(data, self._checksum)
        self.done += len(tokens)

    def enter(self) -> None:
        """Make durable what was appended, then say so."""
        if self.done > (self._blocks[-1][0] if self._blocks else 0):
            os.fsync(self._handle)
            self._blocks.append([self.done, self._checksum])
            self._checksum = 0
            self._say()

    def _say(self) -> None:
        write_json(self._progress_file, {"blocks": self._blocks, "meta": dataclasses.asdict(self._meta)})

    def _open(self, blocks: list[list[int]]) -> tuple[int, list[list[int]]]:
        """The file to go on with and the blocks that are whole in it; a new one where there is none."""
        size = len(self._header) + self._meta.num_images * self._row
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
        if blocks:
            finished = self._path.with_name(TOKENS_NAME)
            if finished.is_file() and not os.path.lexists(self._path):  # killed between this name and meta.json
                os.replace(finished, self._path)
            with suppress(OSError):
                handle = os.open(self._path, flags)
                if os.fstat(handle).st_size == size and os.pread(handle, len(self._header), 0) == self._header:
                    return handle, self._whole(handle, blocks)
                os.close(handle)
            _log.warning("%s: expected the tokens of %d images, got a file without them: all are encoded again",
                         self._path, blocks[-1][0])  # fmt: skip
        self._path.unlink(missing_ok=True)
        self._blocks = []
        self._say()
        handle = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self._reserve(handle, size)
        except OSError as error:
            os.close(handle)
            self._path.unlink()
            self._progress_file.unlink(missing_ok=True)
            raise OSError(
                error.errno, f"{self._path} was not written, it needs {size:,} bytes: {error.strerror}"
            ) from error
        return handle, []

    def _reserve(self, handle: int, size: int) -> None:
        """Take the space now: a disk that is full says so before hours of encoding, not after."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            os.ftruncate(handle, size)
        os.pwrite(handle, self._header, 0)

    def _whole(self, handle: int, blocks: list[list[int]]) -> list[list[int]]:
        """The blocks from the first on whose bytes have the checksum that was entered for them."""
        begin = 0
        for count, (end, checksum) in enumerate(blocks):
            data = os.pread(handle, (end - begin) * self._row, len(self._header) + begin * self._row)
            if len(data) < (end - begin) * self._row or zlib.crc32(data) != checksum:
                _log.warning("%s: the tokens of images %d to %d are damaged: encoded again", self._path, begin, end - 1)
                return blocks[:count]
            begin = end
        return blocks

    def _write(self, data: bytes, offset: int) -> None:
        try:
            while data:
                written = os.pwrite(self._handle, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise OSError(error.errno, f"{self._path} was not written: {error.strerror}") from error


def _begun(folder: Path, meta: TokenCacheMeta, force: bool) -> list[list[int]] | None:
    """The blocks that an earlier run entered in the progress file; None when the cache is whole already."""
    if force:
        for name in _NAMES:
            (folder / name).unlink(missing_ok=True)
    if problem := _problem(folder, meta):
        raise ValueError(f"{problem}; choose another folder, or write over it with force (--force)")
    if (folder / META_NAME).exists():
        return None
    return _blocks(folder / PROGRESS_NAME, meta)[1] if (folder / PROGRESS_NAME).exists() else []


def _problem(folder: Path, meta: TokenCacheMeta) -> str | None:
    """Why a run with these settings must not write into the folder."""
    there = [name for name in _NAMES if os.path.lexists(folder / name)]
    if not there:
        return None
    try:
        if META_NAME in there:
            saved = read_meta(folder / META_NAME)
        elif PROGRESS_NAME in there:
            saved, _ = _blocks(folder / PROGRESS_NAME, meta)
        else:
            return f"out: expected a new folder or a token cache, got {folder}, which holds another {there[0]}"
    except (ValueError, OSError) as error:
        return f"out: expected a new folder or a token cache, got {folder}: {error}"
    unknown = () if saved.data else ("data",)  # an older cache does not say
    if different := differences(dataclasses.asdict(saved), dataclasses.asdict(meta), ("format", *unknown)):
        return f"{folder}: holds a token cache of other images or settings: {'; '.join(different)}"
    return None


def _blocks(path: Path, meta: TokenCacheMeta) -> tuple[TokenCacheMeta, list[list[int]]]:
    """Metadata and finished blocks [end, checksum] of a progress file; ValueError names it where it is damaged."""
    saved: dict[str, Any] = read_json(path, "the progress of a token cache")
    blocks = saved.get("blocks", [])  # alitok_fast 0.1 entered a bare number: it begins again
    begin = 0
    try:
        for end, checksum in blocks:
            if type(end) is not int or type(checksum) is not int or not begin < end <= meta.num_images:
                raise ValueError
            begin = end
    except (TypeError, ValueError):
        raise ValueError(f"{path}: blocks: expected ascending image numbers with checksums, got others") from None
    return checked_meta(saved.get("meta"), path), blocks
