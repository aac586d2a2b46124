"""The token cache: every image encoded once, several crops each, read back through a memory map.

A cache is a folder: `tokens.npy` (images, crops, N), `labels.npy` (images,)
and `meta.json`, which is written last: a folder without it is unfinished, and
`write_token_cache` (data.cache_writer) goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from alitok_fast.storage.files import read_json
from alitok_fast.storage.text import first_line, shown

FORMAT = 2
META_NAME, PROGRESS_NAME = "meta.json", "progress.json"
TOKENS_NAME, LABELS_NAME = "tokens.npy", "labels.npy"
SHARDS_NAME = "shards"  # folder in which several processes write theirs, until they are one
_SAMPLED_IMAGES = 4096
_PIECE = 1 << 16  # images looked at together


@dataclass(frozen=True)
class Shard:
    """Which part of a data set a shard holds: the images from `first` on, of `total`."""

    first: int
    total: int


@dataclass(frozen=True)
class TokenCacheMeta:
    """What the tokens are; compared before an interrupted cache is continued.

    `tokenizer` and `data` are fingerprints of the encoder's weights and of the images, empty in caches that do not know
    them. `shard` is None in a cache of all images.
    """

    num_images: int
    num_crops: int
    num_tokens: int
    codebook_size: int
    image_size: int
    class_names: list[str]
    source: str
    tokenizer: str
    data: str = ""
    format: int = FORMAT
    shard: Shard | None = None

    def to_dict(self) -> dict[str, Any]:
        """What meta.json holds; caches of all images do not speak of shards, and are as they always were."""
        values = asdict(self)
        return values if self.shard else {name: value for name, value in values.items() if name != "shard"}

    def of_shard(self, images: range) -> TokenCacheMeta:
        """The metadata of a shard with these consecutive images."""
        return replace(self, num_images=len(images), shard=Shard(images.start, self.num_images))

    @property
    def whole(self) -> TokenCacheMeta:
        """Of a shard, the metadata of the cache that it is a part of."""
        return replace(self, num_images=self.shard.total, shard=None) if self.shard else self

    @property
    def images(self) -> range:
        """The numbers of the images in the data set; a shard's do not begin at 0."""
        first = self.shard.first if self.shard else 0
        return range(first, first + self.num_images)

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens on disk."""
        return np.dtype(np.uint16 if self.codebook_size <= 1 << 16 else np.int32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the tokens: images, crops, N."""
        return self.num_images, self.num_crops, self.num_tokens


@dataclass(frozen=True)
class TokenCache:
    """tokens (images, crops, N) uint16 or int32, labels (images,) int64."""

    tokens: np.ndarray
    labels: np.ndarray
    meta: TokenCacheMeta

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """One of the image's crops at random, (N,) int64."""
        return self.tokens[index, int(rng.integers(self.meta.num_crops))].astype(np.int64)

    def fingerprint(self) -> str:
        """A short hash of the metadata, all labels, and the tokens of up to 4,096 images."""
        meta = sorted((name, value) for name, value in self.meta.to_dict().items() if name != "format")
        digest = hashlib.sha256(repr(meta).encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        digest.update(np.ascontiguousarray(self.tokens[:: -(-len(self) // _SAMPLED_IMAGES)]).data)
        return digest.hexdigest()[:16]

    @property
    def summary(self) -> str:
        """What it holds, in one line."""
        meta, classes = self.meta, len(self.meta.class_names)
        crops = "1 crop" if meta.num_crops == 1 else f"{meta.num_crops} crops"
        part = f", from image {meta.shard.first} on of {meta.shard.total:,}" if meta.shard else ""
        return (
            f"{shown(meta.source)}: {meta.num_images:,} images x {crops} x {meta.num_tokens} tokens "
            f"in {classes} {'class' if classes == 1 else 'classes'}{part}"
        )


def validate_token_cache(folder: str | Path, check_range: bool = True) -> TokenCache:
    """Open a cache; raises ValueError naming the file, what was expected and what was found."""
    folder = Path(folder)
    if not (folder / META_NAME).is_file():
        reason = "no meta.json"
        if (folder / PROGRESS_NAME).exists() or (folder / SHARDS_NAME).is_dir():
            reason = "an unfinished cache: run the same tokenize command again"
        raise ValueError(f"{folder}: expected a token cache, got {reason}")
    meta = read_meta(folder / META_NAME)
    tokens = _open_array(folder / TOKENS_NAME, meta.shape, meta.dtype)
    labels = _open_array(folder / LABELS_NAME, (meta.num_images,), np.dtype(np.int64))
    if labels.min() < 0 or labels.max() >= len(meta.class_names):
        raise ValueError(
            f"{folder / LABELS_NAME}: expected labels in 0..{len(meta.class_names) - 1}, "
            f"got {labels.min()}..{labels.max()}"
        )
    if check_range:
        smallest, largest = _range(tokens)
        if smallest < 0 or largest >= meta.codebook_size:
            raise ValueError(
                f"{folder / TOKENS_NAME}: expected tokens below {meta.codebook_size}, "
                f"got {largest if smallest >= 0 else smallest}"
            )
    return TokenCache(tokens, labels, meta)


def _range(tokens: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest token, read from the disk once."""
    pieces = (tokens[first : first + _PIECE] for first in range(0, len(tokens), _PIECE))
    smallest, largest = zip(*((int(piece.min()), int(piece.max())) for piece in pieces), strict=True)
    return min(smallest), max(largest)


def read_meta(path: Path) -> TokenCacheMeta:
    """The metadata in meta.json; ValueError names the file, and the key that is wrong."""
    return checked_meta(read_json(path, "token cache metadata"), path)


def checked_meta(raw: Any, path: Path) -> TokenCacheMeta:
    """Metadata from JSON, of this format or as alitok_fast 0.1 wrote them; `path` is where they come from."""
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected token cache metadata, got {type(raw).__name__}")
    raw = _renamed(raw)
    try:
        meta = TokenCacheMeta(**raw)
    except TypeError as error:
        raise ValueError(f"{path}: expected token cache metadata, got {first_line(error)}") from None
    if meta.format not in (1, FORMAT):
        raise ValueError(f"{path}: expected format {FORMAT}, got {shown(repr(meta.format))}")
    for field in fields(meta):
        value = getattr(meta, field.name)
        if field.type == "int" and (type(value) is not int or not 0 < value < 1 << 31):
            raise ValueError(f"{path}: {field.name}: expected a whole number of at least 1, got {shown(repr(value))}")
        if field.type == "str" and not isinstance(value, str):
            raise ValueError(f"{path}: {field.name}: expected text, got {shown(repr(value))}")
    meta = replace(meta, shard=_checked_shard(meta, path))
    names = meta.class_names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: class_names: expected a list of names, got {shown(repr(names))}")
    return meta


def _checked_shard(meta: TokenCacheMeta, path: Path) -> Shard | None:
    raw: Any = meta.shard
    if raw is None:
        return None
    expected = f"{path}: shard: expected the first image and the total of images around {meta.num_images}"
    if not isinstance(raw, dict) or set(raw) != {"first", "total"} or not all(type(v) is int for v in raw.values()):
        raise ValueError(f"{expected}, got {shown(repr(raw))}")
    if not 0 <= raw["first"] <= raw["total"] - meta.num_images < 1 << 31:
        raise ValueError(f"{expected}, got {shown(repr(raw))}")
    return Shard(**raw)


def _renamed(meta: dict[str, Any]) -> dict[str, Any]:
    names = {"images": "num_images", "crops": "num_crops", "tokens": "num_tokens", "classes": "class_names"}
    return {names.get(name, name): value for name, value in meta.items()} if meta.get("format") == 1 else meta


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The beginning of a .npy file of this array, in C order."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return file.getvalue()


def _open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A memory map of a .npy file that must hold exactly this array. Its header is compared, not believed."""
    try:
        with path.open("rb") as file:
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            found_shape, fortran_order, found_dtype = read_header(file)
            offset = file.tell()
    except Exception as error:  # numpy evaluates the header as Python: SyntaxError, TokenError, EOFError, ...
        raise ValueError(f"{path}: expected a whole .npy array, got {first_line(error)}") from error
    if found_shape != shape or found_dtype != dtype or (fortran_order and len(shape) > 1):
        order = " in Fortran order" if fortran_order else ""
        raise ValueError(
            f"{path}: expected {dtype} of shape {shape}, got {found_dtype} of shape {shown(repr(found_shape))}{order}"
        )
    expected, size = offset + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if size != expected:
        raise ValueError(f"{path}: expected a whole .npy array of {expected} bytes, got {size} bytes")
    return np.memmap(path, dtype, "r", offset, shape)
