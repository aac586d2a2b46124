"""IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from alitok_fast.data.checks import require_count
from alitok_fast.data.left_out import LeftOut, Reason

FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_FASHION_MNIST_LABELS = {  # SHA-256 of the label bytes of train and test
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
CLASSES_NAME = "classes.txt"
_PREFIX = {"train": "train", "test": "t10k"}
_MAGIC = {1: 0x00000801, 3: 0x00000803}  # unsigned bytes, one or three dimensions
_MOST_DEFLATED = 1032  # a byte of gzip holds at most this many


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The unsigned-byte array of an IDX file, plain or gzip-compressed.

    No more is read, and no more memory taken, than the header says. Raises ValueError naming the file when it is no
    IDX file of `dimensions` dimensions, or shorter or longer than its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read(path, file.read, file.readinto, dimensions)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got a truncated or damaged one ({error})") from error


def _read(path: Path, read: Callable, readinto: Callable, dimensions: int) -> np.ndarray:
    header = read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions:
        raise ValueError(f"{path}: expected an IDX header of {4 + 4 * dimensions} bytes, got {len(header)} bytes")
    magic = int.from_bytes(header[:4], "big")
    if magic != _MAGIC[dimensions]:
        raise ValueError(f"{path}: expected IDX magic number {_MAGIC[dimensions]:#010x}, got {magic:#010x}")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", dimensions, 4))
    expected = math.prod(shape)
    most = path.stat().st_size * (_MOST_DEFLATED if path.suffix == ".gz" else 1)
    if expected > most:
        raise ValueError(f"{path}: expected {expected} bytes of data for shape {shape}, got at most {most}")
    data, filled = np.empty(expected, np.uint8), 0
    view = data.data
    while filled < expected and (count := readinto(view[filled:])):
        filled += count
    if filled < expected:
        raise ValueError(f"{path}: expected {expected} bytes of data for shape {shape}, got {filled}")
    if read(1):
        raise ValueError(f"{path}: expected {expected} bytes of data for shape {shape}, got more")
    return data.reshape(shape)


def holds_idx(folder: Path) -> bool:
    return any(not file.name.startswith(".") for file in folder.glob("*-ubyte*"))


def _find(folder: Path, split: str, kind: str) -> Path:
    stem = f"{_PREFIX[split]}-{kind}-ubyte"
    for name in (stem, stem.replace("-idx", ".idx")):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise ValueError(f"data: expected {stem} or {stem}.gz in {folder}, found neither")


class IdxImages:
    """Grey IDX images (MNIST's format), padded with black to at least `image_size` and replicated to RGB.

    Class names come from `class_names`, else from a file classes.txt beside the images, one name per line.
    Fashion-MNIST is known by its labels wherever it lies; a part of it, by a folder called fashion-mnist or
    FashionMNIST (or raw/ in it, as torchvision has it). Otherwise classes are called by their numbers.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        image_size: int = 32,
        class_names: list[str] | None = None,
    ) -> None:
        if split not in _PREFIX:
            raise ValueError(f"split: expected one of {sorted(_PREFIX)}, got {split!r}")
        require_count("image_size", image_size)
        folder = Path(folder)
        images_path, labels_path = _find(folder, split, "images-idx3"), _find(folder, split, "labels-idx1")
        self._images = read_idx(images_path, 3)
        labels = read_idx(labels_path, 1)
        self.labels = labels.astype(np.int64)
        if len(self._images) != len(labels):
            raise ValueError(
                f"{labels_path}: expected {len(self._images)} labels, one per image, got {len(self.labels)}"
            )
        if not self._images.size:
            raise ValueError(f"{images_path}: expected at least one image, got shape {self._images.shape}")
        pads = [divmod(max(0, image_size - side), 2) for side in self._images.shape[1:]]
        self._pads = [(half, half + odd) for half, odd in pads]
        self.class_names = _class_names(folder, labels, class_names)
        self.name = f"{folder.name}/{split}"
        self.left_out, self._rows = LeftOut(), np.arange(len(labels))

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> np.ndarray:
        return np.repeat(np.pad(self._images[index], self._pads)[:, :, None], 3, axis=2)

    def sample_name(self, index: int) -> str:
        """What a skip list calls an image: its number in the file."""
        return f"image {int(self._rows[index])}"

    def keep(self, wanted: np.ndarray, reason: Reason) -> None:
        """Leave out the images where `wanted` (len,) is False, and count them under `reason`."""
        for index in np.flatnonzero(~wanted):
            self.left_out.add(reason, self.sample_name(int(index)))
        self._images, self.labels, self._rows = self._images[wanted], self.labels[wanted], self._rows[wanted]

    def fingerprint(self) -> str:
        """A short hash of all pixels and labels."""
        digest = hashlib.sha256(repr((self._images.shape, self._pads)).encode())
        digest.update(np.ascontiguousarray(self._images).data)
        digest.update(self.labels.data)
        return digest.hexdigest()[:16]

    @property
    def summary(self) -> str:
        """What was found, in one line."""
        left = f"; left out: {self.left_out}" if self.left_out.counts else ""
        return f"{self.name}: {len(self):,} pictures in {len(np.unique(self.labels))} classes{left}"


def _class_names(folder: Path, labels: np.ndarray, names: list[str] | None) -> list[str]:
    count = int(labels.max()) + 1
    where: object = "class_names"
    if names is None and (folder / CLASSES_NAME).is_file():
        where = folder / CLASSES_NAME
        try:
            names = [line.strip() for line in where.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: expected names in UTF-8, one per line, got {error}") from None
    if names is None:
        known = hashlib.sha256(labels.tobytes()).hexdigest() in _FASHION_MNIST_LABELS
        place = folder.resolve()
        named = (place.parent if place.name == "raw" else place).name in ("fashion-mnist", "FashionMNIST")
        fashion = known or (named and count <= len(FASHION_MNIST_CLASSES))
        return list(FASHION_MNIST_CLASSES) if fashion else [str(i) for i in range(count)]
    if len(names) < count:
        raise ValueError(f"{where}: expected {count} names, one per class, got {len(names)}")
    return list(names)
