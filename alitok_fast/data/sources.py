"""Image sources: what training and tokenizing read from, and how one is opened."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from alitok_fast.data.checks import require_choice, require_count
from alitok_fast.data.encoded import EncodedImages
from alitok_fast.data.flat_split import imagenet_folder, synset_names
from alitok_fast.data.folders import FolderImages
from alitok_fast.data.hugging_face import PREFIX, HuggingFaceImages, holds_dataset
from alitok_fast.data.idx import IdxImages, holds_idx
from alitok_fast.data.labels import LIST_SUFFIXES, read_class_names
from alitok_fast.data.left_out import LOST, WRONG_LABELS
from alitok_fast.data.lists import ListImages
from alitok_fast.data.pictures import UnreadableImageError, read_image
from alitok_fast.data.shards import ShardImages, holds_shards, is_pattern
from alitok_fast.data.skip_list import skip_samples

__all__ = [
    "ImageSource",
    "UnreadableImageError",
    "check_source",
    "open_source",
    "read_image",
    "source_fingerprint",
]

_log = logging.getLogger(__name__)
HELD_OUT = ("val", "validation", "test")  # the splits that nothing is trained on, in the order they are looked for
_SAMPLED_IMAGES = 16


class ImageSource(Protocol):
    """Pictures with classes, by index. `check_source` says what an object of your own lacks; plain attributes will do.

    A method `fingerprint() -> str`, a hash of all that decides the pictures, is used where there is one; otherwise
    `source_fingerprint` hashes labels, names and a few pictures. `image` is called from several threads, and, where it
    is read by worker processes, of copies of the source, which is then pickled.
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
    *,
    skip_list: str | Path | None = None,
    **options: Any,
) -> IdxImages | EncodedImages:
    """The pictures that `path` names: a folder of IDX files, of class folders, of webdataset shards or by `datasets`;
    a list; shards by name or braces; "hf:NAME" (see docs/data.md). Where it holds splits, `split` chooses one.

    `image_size`: the model's side in pixels. IDX images are padded to it (to 32 if not given); with `draft`, large
    JPEGs are decoded at a size that is enough for it (whole if not given). `draft`, `apply_orientation` and
    `convert_profile` are for pictures, see `alitok_fast.data.pictures`: the published preparation has none of them.
    `skip_list`: a file by `alitok-fast data check`, whose samples are left out.
    `options` are those of `find_source`.

    on_error "stop": what cannot be used is an error, samples with a wrong label, damaged shards and listed files that
    are not there at once, and unreadable pictures when they are reached. "skip" decodes every picture once at the
    start, and leaves all of these out. What was found and what was left out goes to `report` as one line; without it,
    to the log, as a warning where something that may be data was left out.
    """
    require_choice("on_error", on_error, ("stop", "skip"))
    source = find_source(path, split, image_size, apply_orientation, convert_profile, draft, **options)
    if skip_list is not None:
        skip_samples(source, Path(skip_list))
    if isinstance(source, EncodedImages):
        if on_error == "stop":
            _stop_at_losses(source, path)
        else:
            source.drop_unreadable()
    if not len(source):
        raise ValueError(f"data: expected at least one readable image in {path}, got {source.summary}")
    (report or (_log.warning if source.left_out.doubtful else _log.info))(source.summary)
    return source


def find_source(
    path: str | Path,
    split: str = "train",
    image_size: int | None = None,
    apply_orientation: bool = True,
    convert_profile: bool = True,
    draft: bool = True,
    *,
    root: str | Path | None = None,
    labels: str | Path | None = None,
    class_names: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    index_folder: str | Path | None = None,
) -> IdxImages | EncodedImages:
    """As `open_source`, with whatever is wrong with the data counted in `left_out`. Pictures are not decoded.

    `root`: the folder of a list's pictures. `labels`: a list of the classes of a split without class folders.
    `class_names`: a file that names the classes. `image_column`, `label_column`: of `datasets` and shards.
    `index_folder`: where the index of shards is kept. ValueError names an option that the data have no use for.
    """
    if image_size is not None:
        require_count("image_size", image_size)
    enough = image_size if draft else None
    reading = {"image_size": enough, "apply_orientation": apply_orientation, "convert_profile": convert_profile}
    given = {"root": root, "labels": labels, "class_names": class_names, "image_column": image_column,
             "label_column": label_column, "index_folder": index_folder}  # fmt: skip
    kind, uses = _kind(str(path))
    for name, value in given.items():
        if value is not None and name not in uses:
            raise ValueError(f"{name}: expected nothing, since {path} is {kind}, got {value}")
    classes = None if class_names is None else read_class_names(Path(class_names))
    place = Path(path)
    if kind == HUGGING_FACE:
        return HuggingFaceImages(str(path), split, classes, image_column, label_column, **reading)
    if kind == SHARDS:
        index = None if index_folder is None else Path(index_folder)
        return ShardImages(str(path), split, classes, image_column, label_column, index, **reading)
    if kind == LIST:
        if split != "train":
            raise ValueError(f"split: expected 'train', since {path} is one list, got {split!r}")
        return ListImages(place, None if root is None else Path(root), classes, **reading)
    if kind == IDX:
        return IdxImages(path, split, image_size or 32, None if classes is None else classes.names)
    place = imagenet_folder(place)
    listed = None if labels is None else Path(labels)
    return FolderImages(place, "stop", split, listed, classes or synset_names(place), **reading)


HUGGING_FACE, SHARDS, LIST = "a data set of Hugging Face", "webdataset shards", "a list of pictures"
IDX, FOLDERS = "a folder of IDX files", "a folder of pictures"


def _kind(path: str) -> tuple[str, tuple[str, ...]]:
    """What a path names, and which options it has a use for."""
    place = Path(path)
    if path.startswith(PREFIX) or (place.is_dir() and holds_dataset(place)):
        return HUGGING_FACE, ("class_names", "image_column", "label_column")
    if is_pattern(path) and not place.is_dir():
        return SHARDS, ("class_names", "image_column", "label_column", "index_folder")
    if place.is_file() and place.suffix.lower() in LIST_SUFFIXES:
        return LIST, ("root", "class_names")
    if not place.is_dir():
        raise ValueError(
            f"data: expected a folder with IDX files, pictures or shards, a list ({', '.join(sorted(LIST_SUFFIXES))}), "
            f"shards (.tar) or hf:NAME, got {path}"
        )
    if holds_idx(place):
        return IDX, ("class_names",)
    if holds_shards(place):
        return SHARDS, ("class_names", "image_column", "label_column", "index_folder")
    return FOLDERS, ("labels", "class_names")


def _stop_at_losses(source: EncodedImages, path: str | Path) -> None:
    lost = [reason for reason in (*LOST, *WRONG_LABELS) if reason in source.left_out.counts]
    if lost:
        found = ", ".join(map(source.left_out.said, lost))
        raise ValueError(
            f"data: expected whole data in {path}, got {found}; on_error='skip' trains on the {len(source):,} others, "
            "and `alitok-fast data check` names each"
        )
