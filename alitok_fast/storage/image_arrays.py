"""Images out of ADM's files, `.npz` with `arr_0`, and out of `.npy`: piece by piece, however large they are."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from alitok_fast.storage.text import first_line, shown

LARGEST_SIDE = 1 << 14


@dataclass(frozen=True)
class ImageArray:
    """A file of `count` images of `height` x `width` pixels, (n, H, W, 3) uint8; nothing of them is held."""

    path: Path
    count: int
    height: int
    width: int

    @property
    def size(self) -> int | str:
        """The side in pixels, or "width x height"."""
        return self.width if self.width == self.height else f"{self.width} x {self.height}"

    @classmethod
    def open(cls, path: Path, argument: str = "path") -> ImageArray:
        """Read the header. Raises ValueError naming `argument`, OSError for a file that cannot be read."""
        with _member(path, argument) as file:
            count, height, width, _ = _shape(file, path, argument)
        return cls(path, count, height, width)

    def batches(self, size: int, begin: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
        """Images `begin` to `end`, (b, H, W, 3) uint8 with b <= size. Raises ValueError where the file ends early."""
        end = self.count if end is None else end
        if size < 1 or not 0 <= begin <= end <= self.count:
            raise ValueError(
                f"batches: expected size >= 1 and 0 <= begin <= end <= {self.count}, got {size}, {begin}, {end}"
            )
        of_one = self.height * self.width * 3
        with _member(self.path, "path") as file:
            _shape(file, self.path, "path")
            _skip(file, begin * of_one)
            for at in range(begin, end, size):
                count = min(size, end - at)
                data = file.read(count * of_one)
                if len(data) != count * of_one:
                    raise ValueError(f"{self.path}: expected {self.count} images, got {at + len(data) // of_one}")
                yield np.frombuffer(data, np.uint8).reshape(count, self.height, self.width, 3)


@contextlib.contextmanager
def _member(path: Path, argument: str) -> Iterator[IO[bytes]]:
    """The array's bytes, from its header on; what is damaged becomes a ValueError."""
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                yield file
            return
        with zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                names = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:5])
                raise ValueError(f"{argument}: expected images in arr_0, got {path} with {shown(names) or 'nothing'}")
            with archive.open("arr_0.npy") as file:
                yield file
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{argument}: expected an npz file, got {path} ({shown(first_line(error))})") from None


def _shape(file: IO[bytes], path: Path, argument: str) -> tuple[int, int, int, int]:
    try:
        version = npy.read_magic(file)
        read: Any = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{argument}: expected an array, got {path} ({shown(first_line(error))})") from None
    if (
        dtype != np.uint8
        or fortran
        or len(shape) != 4
        or shape[3] != 3
        or not all(0 < n <= LARGEST_SIDE for n in shape[1:3])
    ):
        order = " in Fortran's order" if fortran else ""
        raise ValueError(f"{argument}: expected uint8 images (n, H, W, 3), got {dtype} {shape}{order} in {path}")
    return shape


def _skip(file: IO[bytes], count: int) -> None:
    """A compressed member is read over, an uncompressed one too: zipfile seeks by reading."""
    while count:
        read = len(file.read(min(count, 1 << 18)))
        if not read:
            return
        count -= read
