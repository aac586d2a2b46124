"""Image sources: IDX files (Fashion-MNIST) and folders of pictures.

A source has `len(source)`, `source.class_names` (names), `source.labels` (int64
array) and `source.image(i)`, an RGB uint8 array (H, W, 3).
"""

from __future__ import annotations

import gzip
import logging
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_IDX_PREFIX = {"train": "train", "test": "t10k"}
_IDX_MAGIC = {1: 0x00000801, 3: 0x00000803}  # unsigned bytes, one or three dimensions


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded; the message names it."""


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The unsigned-byte array of an IDX file, plain or gzip-compressed.

    Raises ValueError naming the file when it is no IDX file of `dimensions`
    dimensions, or shorter or longer than its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got a truncated or damaged one ({error})") from error
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise ValueError(f"{path}: expected an IDX header of {header} bytes, got {len(raw)} bytes")
    magic = int.from_bytes(raw[:4], "big")
    if magic != _IDX_MAGIC[dimensions]:
        raise ValueError(f"{path}: expected IDX magic number {_IDX_MAGIC[dimensions]:#010x}, got {magic:#010x}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dimensions, 4))
    expected = int(np.prod(shape, dtype=np.int64))
    if len(raw) - header != expected:
        raise ValueError(f"{path}: expected {expected} bytes of data for shape {shape}, got {len(raw) - header}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _find_idx(folder: Path, split: str, kind: str) -> Path:
    stem = f"{_IDX_PREFIX[split]}-{kind}-ubyte"
    for name in (stem, f"{stem}.gz", stem.replace("-idx", ".idx")):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"data: expected {stem} or {stem}.gz in {folder}, found neither")


class IdxImages:
    """Grey IDX images (MNIST's format), padded with black to at least `image_size` and replicated to RGB."""

    def __init__(self, folder: str | Path, split: str = "train", image_size: int = 32) -> None:
        if split not in _IDX_PREFIX:
            raise ValueError(f"split: expected one of {sorted(_IDX_PREFIX)}, got {split!r}")
        folder = Path(folder)
        images_path = _find_idx(folder, split, "images-idx3")
        labels_path = _find_idx(folder, split, "labels-idx1")
        images = read_idx(images_path, 3)
        self.labels = read_idx(labels_path, 1).astype(np.int64)
        if len(images) != len(self.labels):
            raise ValueError(f"{labels_path}: expected {len(images)} labels, one per image, got {len(self.labels)}")
        if len(images) == 0:
            raise ValueError(f"{images_path}: expected at least one image, got none")
        pads = [divmod(max(0, image_size - side), 2) for side in images.shape[1:]]
        self._images = np.pad(images, [(0, 0), *((half, half + odd) for half, odd in pads)])
        count = int(self.labels.max()) + 1
        fashion = "fashion" in str(folder.resolve()) and count == len(FASHION_MNIST_CLASSES)
        self.class_names = list(FASHION_MNIST_CLASSES) if fashion else [str(i) for i in range(count)]
        self.name = f"{folder.name}/{split}"

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> np.ndarray:
        return np.repeat(self._images[index][:, :, None], 3, axis=2)


def read_image(path: Path) -> np.ndarray:
    """The picture as (H, W, 3) uint8 RGB; UnreadableImageError names a file that is none."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises all of these
        raise UnreadableImageError(f"{path}: expected a readable image, got {type(error).__name__}: {error}") from error


class FolderImages:
    """A folder of pictures; its sub-folders, sorted by name, are the classes. Without sub-folders: one class.

    on_error "stop" raises UnreadableImageError when a bad file is reached.
    "skip" decodes every file once at the start, warns about each bad one by
    name and leaves it out, so that the data order stays fixed afterwards.
    """

    def __init__(self, folder: str | Path, on_error: str = "stop") -> None:
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error: expected 'stop' or 'skip', got {on_error!r}")
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"data: expected a folder, got {folder}")
        groups = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        groups = groups or [folder]
        self.class_names = [group.name for group in groups]
        files = [
            (path, label)
            for label, group in enumerate(groups)
            for path in sorted(group.rglob("*") if group != folder else group.iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        ]
        if on_error == "skip":
            files = _readable(files)
        if not files:
            raise ValueError(f"data: expected at least one readable image under {folder}, found none")
        self.paths = [path for path, _ in files]
        self.labels = np.array([label for _, label in files], np.int64)
        self.name = folder.name

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> np.ndarray:
        return read_image(self.paths[index])


def _readable(files: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
    def problem(entry: tuple[Path, int]) -> str | None:
        try:
            read_image(entry[0])
        except UnreadableImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, files))
    for text in filter(None, problems):
        _log.warning("skipped %s", text)
    return [entry for entry, text in zip(files, problems, strict=True) if text is None]


def open_source(
    path: str | Path, split: str = "train", image_size: int = 32, on_error: str = "stop"
) -> IdxImages | FolderImages:
    """IDX files when `path` holds any, else a folder of pictures (`path/<split>` when that exists)."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"data: expected a folder with IDX files or pictures, got {path}")
    if any(path.glob("*-ubyte*")):
        return IdxImages(path, split, image_size)
    return FolderImages(path / split if (path / split).is_dir() else path, on_error)
