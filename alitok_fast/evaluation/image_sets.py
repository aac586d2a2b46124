"""Sets of images whose features are computed: files of arrays, folders of PNGs, crops of a data set."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from alitok_fast.data.pictures import picture_suffixes, read_image
from alitok_fast.data.reading import default_workers, read_ahead
from alitok_fast.data.sources import ImageSource, check_picture, source_fingerprint
from alitok_fast.data.transforms import PREPARATION, centre_crop
from alitok_fast.evaluation.feature_folder import CHUNK
from alitok_fast.storage.files import file_sha256
from alitok_fast.storage.image_arrays import ImageArray
from alitok_fast.storage.text import shown

CROP = f"ADM's centre crop (preparation {PREPARATION})"
ARRAYS = (".npz", ".npy")
_PNG, _PNG_HEADER = b"\x89PNG\r\n\x1a\n", 24  # bytes up to the end of width and height


class ImageSet(Protocol):
    """Images by number, all of one size. `facts` has all that could change their pixels; `chunk` images are a file of
    features."""

    @property
    def name(self) -> str:
        """What people call them."""

    @property
    def count(self) -> int: ...

    @property
    def size(self) -> int | str:
        """The side in pixels, or "width x height"."""

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def chunk(self) -> int: ...

    def batches(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Images `begin` to `end`, (b, H, W, 3) uint8."""


@dataclass(frozen=True)
class StoredImages:
    """An npz or npy of images, or a folder of PNGs, as they are; by `open`."""

    path: Path
    count: int
    size: int | str
    files: tuple[Path, ...]  # of a folder
    facts: Mapping[str, Any]
    batch_size: int
    chunk: int = CHUNK

    @property
    def name(self) -> str:
        return self.path.name

    @classmethod
    def open(
        cls, path: Path, batch_size: int, limit: int | None = None, sha256: str | None = None, argument: str = "images"
    ) -> StoredImages:
        """Look at headers and hash all bytes; `sha256` saves that where it is known. `limit`: the first so many.

        The PNGs of a folder are taken in natural order (2 before 10). Raises ValueError naming `argument` for other
        files: a JPEG has other pixels than what was sampled, which changes a Frechet distance; other formats and
        pictures of several sizes are refused, too. OSError for what cannot be read.
        """
        files: tuple[Path, ...] = ()
        if path.suffix.lower() in ARRAYS and not path.is_dir():
            array = ImageArray.open(path, argument)
            found, width, height = array.count, array.width, array.height
        elif path.is_dir():
            files, (width, height) = _pngs(path, argument)
            found = len(files)
        else:
            raise ValueError(f"{argument}: expected an npz or npy file or a folder of PNGs, got {path}")
        count = found if limit is None else min(limit, found)
        if count < 2:
            raise ValueError(f"{argument}: expected at least 2 images, got {count} in {path}")
        digest = sha256 or (_sha256_of(files[:count]) if files else file_sha256(path))
        facts = {
            "kind": "PNGs" if files else path.suffix.lower()[1:],
            "sha256": digest,
            "count": count,
            "rounding": "as stored",
        }
        return cls(path, count, width if width == height else f"{width} x {height}", files[:count], facts, batch_size)

    def batches(self, begin: int, end: int) -> Iterator[np.ndarray]:
        if not self.files:
            yield from ImageArray.open(self.path).batches(self.batch_size, begin, end)
            return
        spans = (self.files[at : min(at + self.batch_size, end)] for at in range(begin, end, self.batch_size))
        for pictures in read_ahead(spans, _read_png, default_workers()):
            yield np.stack(pictures)


@dataclass(frozen=True)
class CroppedImages:
    """ADM's centre crops of a data set's pictures, (size, size, 3). `reading`: how the source reads them."""

    source: ImageSource
    size: int
    batch_size: int
    workers: int
    reading: str
    facts: Mapping[str, Any] = field(init=False)
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"data: expected at least 2 images, got {self.count}")
        facts = {
            "kind": "data set",
            "name": self.name,
            "fingerprint": source_fingerprint(self.source),
            "count": self.count,
            "reading": self.reading,
        }
        object.__setattr__(self, "facts", facts)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def count(self) -> int:
        return len(self.source)

    def batches(self, begin: int, end: int) -> Iterator[np.ndarray]:
        spans = (range(at, min(at + self.batch_size, end)) for at in range(begin, end, self.batch_size))
        for crops in read_ahead(spans, self._crop, self.workers):
            yield np.stack(crops)

    def _crop(self, index: int) -> np.ndarray:
        return centre_crop(check_picture(self.source.image(index), index), self.size)


def _pngs(folder: Path, argument: str) -> tuple[tuple[Path, ...], tuple[int, int]]:
    """The PNGs in natural order, and their width and height."""
    pictures = [file for file in folder.iterdir() if not file.name.startswith(".")]
    for file in sorted(pictures):
        if file.is_dir():
            raise ValueError(
                f"{argument}: expected PNGs beside each other, got the folder {shown(file.name)} in {folder}"
            )
        if file.suffix.lower() in picture_suffixes() - {".png"}:
            raise ValueError(
                f"{argument}: expected PNGs, got {shown(file.name)} in {folder}"
                + ("; JPEG changes pixels and so a Frechet distance" if re.search(r"\.jp\w*$", file.name, re.I) else "")
            )
    files = tuple(
        sorted(
            (file for file in pictures if file.suffix.lower() == ".png"), key=lambda file: (_natural(file), file.name)
        )
    )
    if not files:
        raise ValueError(f"{argument}: expected PNGs, got {folder} without any")
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        sizes.setdefault(_png_size(file, argument), file)
        if len(sizes) > 1:
            (one, first), (other, second) = sizes.items()
            raise ValueError(
                f"{argument}: expected PNGs of one size, got {one[0]} x {one[1]} in {shown(first.name)} and "
                f"{other[0]} x {other[1]} in {shown(second.name)}"
            )
    return files, next(iter(sizes))


def _natural(file: Path) -> list[tuple[int, str]]:
    """2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name) if part]


def _png_size(file: Path, argument: str) -> tuple[int, int]:
    with file.open("rb") as stream:
        header = stream.read(_PNG_HEADER)
    if len(header) < _PNG_HEADER or not header.startswith(_PNG):
        kind = "a JPEG, which changes pixels and so a Frechet distance" if header[:3] == b"\xff\xd8\xff" else "no PNG"
        raise ValueError(f"{argument}: expected PNGs, got {kind}, in {file}")
    width, height = struct.unpack(">II", header[16:])
    return width, height


def _read_png(file: Path) -> np.ndarray:
    return read_image(file, apply_orientation=False, convert_profile=False)


def _sha256_of(files: tuple[Path, ...]) -> str:
    """Of names and bytes."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()
