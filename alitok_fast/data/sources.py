"""Image sources: what training and tokenizing read from, and how one is opened."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from alitok_fast.data.checks import require_choice, require_count
from alitok_fast.data.folders import LOOSE, OTHER_FILES, OTHER_SPLITS, TWICE, UNREADABLE, FolderImages
from alitok_fast.data.idx import IdxImages, holds_idx
from alitok_fast.data.pictures import UnreadableImageError, read_image

__all__ = [
    "ImageSource",
    "UnreadableImageError",
    "check_source",
    "open_source",
    "read_image",
    "source_fingerprint",
]

_log = logging.getLogger(__name__)
_SAMPLED_IMAGES = 16


class ImageSource(Protocol):
    """Pictures with classes, by index. `check_source` says what an object of your own lacks; plain attributes will do.

    A method `fingerprint() -> str`, a hash of all that decides the pictures, is used where there is one; otherwise
    `source_fingerprint` hashes labels, names and a few pictures. `image` is called from several threads.
    """

    @property
    def name(self) -> str:
        """What the data are called in a model's provenance."""

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def labels(self) -> np.ndarray:
        """(len,) integers in [0, len(class_names))."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """Picture `index` as (H, W, 3) uint8 RGB, the same each time."""


def check_source(source: ImageSource) -> None:
    """Raise TypeError or ValueError naming what an image source lacks. Reads its first picture."""
    kind = type(source).__name__
    for name in ("name", "class_names", "labels", "image", "__len__"):
        if not hasattr(source, name):
            raise TypeError(f"source: expected an ImageSource (alitok_fast.data), got a {kind} without {name!r}")
    if not isinstance(source.name, str):
        raise TypeError(f"source.name: expected text, got {source.name!r}")
    names = source.class_names
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"source.class_names: expected a list of names, got {names!r}")
    if len(source) < 1:
        raise ValueError(f"source: expected at least one picture, got {len(source)}")
    labels = np.asarray(source.labels)
    if labels.shape != (len(source),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"source.labels: expected ({len(source)},) integers, one per picture, got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"source.labels: expected 0 to {len(names) - 1}, got {labels.min()} to {labels.max()}")
    check_picture(source.image(0), 0)


def check_picture(image: np.ndarray, index: int) -> np.ndarray:
    """`image`, where it is (H, W, 3) uint8 of at least one pixel; TypeError or ValueError otherwise."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"source.image({index}): expected a uint8 array, got {found}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"source.image({index}): expected shape (H, W, 3), got {image.shape}")
    return image


def source_fingerprint(source: ImageSource) -> str:
    """A short hash of the data: the source's own, else of its labels, class names and up to 16 of its pictures."""
    if hasattr(source, "fingerprint"):
        return str(source.fingerprint())
    digest = hashlib.sha256(repr((len(source), list(source.class_names))).encode())
    digest.update(np.ascontiguousarray(source.labels, np.int64).data)
    for index in range(0, len(source), -(-len(source) // _SAMPLED_IMAGES)):
        picture = source.image(index)
        digest.update(repr(picture.shape).encode())
        digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()[:16]


def open_source(
    path: str | Path,
    split: str = "train",
    image_size: int | None = None,
    on_error: str = "stop",
    apply_orientation: bool = True,
    convert_profile: bool = True,
    report: Callable[[str], object] | None = None,
    draft: bool = True,
) -> IdxImages | FolderImages:
    """IDX files when `path` holds any, else a folder of pictures, `path/<split>` where it holds splits.

    `image_size`: the model's side in pixels. IDX images are padded to it (to 32 if not given); with `draft`, large
    JPEGs are decoded at a size that is enough for it (whole if not given). `draft`, `apply_orientation` and
    `convert_profile` are for pictures, see `alitok_fast.data.pictures`: the published preparation has none of them.
    What was found and what was left out goes to `report` as one line; without it, to the log, as a warning where
    something that may be data was left out.
    """
    path = Path(path)
    require_choice("on_error", on_error, ("stop", "skip"))
    if image_size is not None:
        require_count("image_size", image_size)
    if not path.is_dir():
        raise ValueError(f"data: expected a folder with IDX files or pictures, got {path}")
    if holds_idx(path):
        source: IdxImages | FolderImages = IdxImages(path, split, image_size or 32)
        doubtful = False
    else:
        enough = image_size if draft else None
        source = FolderImages(path, on_error, split, enough, apply_orientation, convert_profile)
        doubtful = not source.left_out.counts.keys().isdisjoint({LOOSE, OTHER_FILES, OTHER_SPLITS, TWICE, UNREADABLE})
    (report or (_log.warning if doubtful else _log.info))(source.summary)
    return source
