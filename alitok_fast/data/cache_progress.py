"""The part of a token cache that is there already, and how far it goes: what an interrupted writer continues."""

from __future__ import annotations

import logging
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from alitok_fast.data.token_cache import (
    META_NAME,
    PROGRESS_NAME,
    SHARDS_NAME,
    TOKENS_NAME,
    TokenCacheMeta,
    checked_meta,
    npy_header,
    read_meta,
)
from alitok_fast.storage.files import read_json, write_json

_log = logging.getLogger(__name__)
PARTIAL_NAME = "tokens.partial.npy"


class PartialTokens:
    """tokens.partial.npy, written from the front, and progress.json: up to which image, with which checksums."""

    def __init__(self, folder: Path, meta: TokenCacheMeta, blocks: list[list[int]]) -> None:
        self._path, self._progress_file, self._meta = folder / PARTIAL_NAME, folder / PROGRESS_NAME, meta
        self._header = npy_header(meta.shape, meta.dtype)
        self._row = meta.num_crops * meta.num_tokens * meta.dtype.itemsize
        self._handle, self._blocks = self._open(blocks)
        self.done = self._blocks[-1][0] if self._blocks else 0
        self._checksum = 0

    def __enter__(self) -> PartialTokens:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._handle)

    def append(self, tokens: np.ndarray) -> None:
        """The tokens of the next images, (images, crops, N)."""
        data = tokens.astype(self._meta.dtype).tobytes()
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
        write_json(self._progress_file, {"blocks": self._blocks, "meta": self._meta.to_dict()})

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
            _log.warning("%s: expected the tokens of %d images, got a file without them: all are written again",
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
                _log.warning("%s: the tokens of images %d to %d are damaged: written again", self._path, begin, end - 1)
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


def read_progress(path: Path) -> tuple[TokenCacheMeta, list[list[int]]]:
    """Metadata and finished blocks [end, checksum] of a progress file; ValueError names it where it is damaged."""
    saved: dict[str, Any] = read_json(path, "the progress of a token cache")
    meta = checked_meta(saved.get("meta"), path)
    blocks = saved.get("blocks", [])  # alitok_fast 0.1 entered a bare number: it begins again
    begin = 0
    try:
        for end, checksum in blocks:
            if type(end) is not int or type(checksum) is not int or not begin < end <= meta.num_images:
                raise ValueError
            begin = end
    except (TypeError, ValueError):
        raise ValueError(f"{path}: blocks: expected ascending image numbers with checksums, got others") from None
    return meta, blocks


def begun_cache(folder: str | Path) -> tuple[TokenCacheMeta, int]:
    """The metadata of a cache, whole or not, and how many of its images are there; ValueError where there is none."""
    folder = Path(folder)
    if (folder / META_NAME).is_file():
        meta = read_meta(folder / META_NAME)
        return meta, meta.num_images
    if (folder / PROGRESS_NAME).is_file():
        meta, blocks = read_progress(folder / PROGRESS_NAME)
        return meta, blocks[-1][0] if blocks else 0
    begun = {file.parent for name in (META_NAME, PROGRESS_NAME) for file in folder.glob(f"{SHARDS_NAME}/*/{name}")}
    shards = [begun_cache(shard) for shard in sorted(begun)]
    if not shards:
        raise ValueError(f"{folder}: expected a token cache, got no {META_NAME}")
    return shards[0][0].whole, sum(done for _, done in shards)
