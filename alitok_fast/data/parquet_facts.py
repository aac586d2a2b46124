"""What parquet files of tokens say about themselves, and what has to be known of them beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from alitok_fast.config import TokenizerConfig, tokenizer_preset
from alitok_fast.data.checks import require_count
from alitok_fast.data.parquet_table import ParquetFile
from alitok_fast.data.token_cache import TokenCacheMeta, checked_meta
from alitok_fast.storage.files import differences
from alitok_fast.storage.text import shown

METADATA_KEY = "alitok_fast"
_PUBLISHED = ("256", "512")


@dataclass(frozen=True)
class ParquetColumns:
    """Names of columns: the tokens of an image, or of one crop where `image` names the image that it is of."""

    tokens: str = "tokens"
    label: str = "label"
    image: str | None = None


@dataclass(frozen=True)
class TokenFacts:
    """What is known of tokens that their files do not say; None: not known."""

    tokenizer: str | None = None
    codebook_size: int | None = None
    image_size: int | None = None
    num_tokens: int | None = None
    num_crops: int | None = None
    class_names: list[str] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        for name in ("codebook_size", "image_size", "num_tokens", "num_crops"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))


def row_layout(cell: tuple[int, ...], rows: int, columns: ParquetColumns, facts: TokenFacts) -> tuple[int, int]:
    """Crops and tokens of an image whose `rows` rows have this shape."""
    length = int(np.prod(cell))
    if columns.image is not None:
        crops = rows * (length // cell[-1])
    elif len(cell) == 2:
        crops = cell[0]
    elif facts.num_crops or facts.num_tokens:
        crops = facts.num_crops or max(1, length // (facts.num_tokens or 1))
    else:
        fitting = [config for config in _published(facts) if length % config.num_tokens == 0]
        crops = length // fitting[0].num_tokens if fitting else 1
    num_tokens = rows * length // crops
    for name, value in (("num_crops", crops), ("num_tokens", num_tokens)):
        expected = getattr(facts, name)
        if expected is not None and value != expected or crops * num_tokens != rows * length:
            raise ValueError(f"{name}: expected {expected or value}, got rows of {cell} tokens in {columns.tokens!r}")
    return crops, num_tokens


def _published(facts: TokenFacts) -> list[TokenizerConfig]:
    configs = map(tokenizer_preset, _PUBLISHED)
    return [config for config in configs if facts.image_size in (None, config.image_size)]


def sizes_of_images(num_tokens: int, facts: TokenFacts) -> tuple[int, int]:
    """The image's size and the codebook's: as known, else of the published tokenizer with as many tokens."""
    fitting = [config for config in _published(facts) if config.num_tokens == num_tokens]
    sizes = []
    for name in ("image_size", "codebook_size"):
        given = getattr(facts, name)
        if given is None and not fitting:
            raise ValueError(
                f"{name}: expected a number, since no published tokenizer makes {num_tokens} tokens of an image, got "
                "none (or name the tokenizer)"
            )
        sizes.append(given or getattr(fitting[0], name))
    return sizes[0], sizes[1]


def hub_class_names(file: ParquetFile, column: str) -> list[str] | None:
    """The names that the features of a Hugging Face data set give the labels."""
    value: Any = file.json("huggingface")
    for key in ("info", "features", column, "names"):
        value = value.get(key) if isinstance(value, dict) else None
    whole = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    return value if whole else None


def exported_cache(
    files: list[ParquetFile],
) -> tuple[TokenCacheMeta | None, ParquetColumns | None, list[ParquetFile]]:
    """The cache's metadata and the columns, as `export_parquet` entered them, and the files in order of their images.

    None, and the files as they are, where others wrote them. ValueError where one is missing or of another cache.
    """
    described = [(file, file.json(METADATA_KEY)) for file in files]
    if not any(raw for _, raw in described):
        return None, None, files
    metas: list[TokenCacheMeta] = []
    firsts: dict[ParquetFile, int] = {}
    for file, raw in described:
        metas.append(checked_meta(raw.get("cache"), file.path))
        if different := differences(metas[0].to_dict(), metas[-1].to_dict()):
            raise ValueError(f"{file.path}: expected a file of the same cache as {files[0].path}: {different[0]}")
        first = raw.get("first")
        if type(first) is not int:
            raise ValueError(f"{file.path}: first: expected a whole number, got {shown(repr(first))}")
        firsts[file] = first
    here = 0
    files = sorted(files, key=firsts.__getitem__)
    for file in files:
        if firsts[file] != here:
            raise ValueError(f"{file.path}: expected a file that begins with image {here}, got {firsts[file]}")
        here += file.rows
    if here != metas[0].num_images:
        raise ValueError(f"parquet: expected {metas[0].num_images} images, as {files[0].path} says, got {here}")
    names = described[0][1].get("columns")
    if (
        not isinstance(names, dict)
        or set(names) != {"tokens", "label"}
        or not all(isinstance(name, str) for name in names.values())
    ):
        raise ValueError(f"{files[0].path}: columns: expected the names of tokens and label, got {shown(repr(names))}")
    return metas[0], ParquetColumns(**names), files
