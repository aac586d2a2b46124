"""The token cache: every image encoded once, several crops each, read back through a memory map.

A cache is a folder: `tokens.npy` (images, crops, N), `labels.npy` (images,)
and `meta.json`, which is written last: a folder without it is unfinished, and
`write_token_cache` goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from alitok_fast.data.transforms import cache_crops, to_tensor
from alitok_fast.storage.files import differences, write_json

_FORMAT = 2


@dataclass(frozen=True)
class TokenCacheMeta:
    """What the tokens are; compared before an interrupted cache is continued."""

    num_images: int
    num_crops: int
    num_tokens: int
    codebook_size: int
    image_size: int
    class_names: list[str]
    source: str
    tokenizer: str
    format: int = _FORMAT


@dataclass(frozen=True)
class TokenCache:
    """tokens (images, crops, N) uint16 or int32, labels (images,) int64."""

    tokens: np.ndarray
    labels: np.ndarray
    meta: TokenCacheMeta

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """One of the image's crops at random, (N,) int64."""
        return self.tokens[index, int(rng.integers(self.meta.num_crops))].astype(np.int64)


def token_dtype(codebook_size: int) -> np.dtype:
    return np.dtype(np.uint16 if codebook_size <= 1 << 16 else np.int32)


def write_token_cache(
    folder: str | Path,
    source,
    encode: Callable[[Tensor], Tensor],
    meta: TokenCacheMeta,
    batch_size: int = 64,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Encode every image of `source` (see data.sources) into `folder`; continue an interrupted run.

    `encode` takes (B, 3, S, S) in [0, 1] and gives (B, N) int64. Raises
    ValueError when the folder holds a cache of other settings, or tokens out
    of range come back.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    progress_file, partial = folder / "progress.json", folder / "tokens.partial.npy"
    shape, dtype = (meta.num_images, meta.num_crops, meta.num_tokens), token_dtype(meta.codebook_size)
    start = _resume_at(folder, meta)
    if start is None:
        return
    if start:
        tokens = np.lib.format.open_memmap(partial, mode="r+")
    else:
        tokens = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
    for first in progress(range(start, meta.num_images, batch_size)):
        last = min(first + batch_size, meta.num_images)
        crops = np.concatenate(
            [cache_crops(source.image(i), meta.image_size, meta.num_crops) for i in range(first, last)]
        )
        found = encode(to_tensor(crops))
        if (
            found.shape != (len(crops), meta.num_tokens)
            or int(found.min()) < 0
            or int(found.max()) >= meta.codebook_size
        ):
            raise ValueError(
                f"encode: expected ({len(crops)}, {meta.num_tokens}) tokens below {meta.codebook_size}, "
                f"got shape {tuple(found.shape)} in {int(found.min())}..{int(found.max())}"
            )
        tokens[first:last] = found.cpu().numpy().reshape(last - first, meta.num_crops, meta.num_tokens)
        if (first // batch_size) % 16 == 0:
            tokens.flush()
            write_json(progress_file, {"done": last, "meta": dataclasses.asdict(meta)})
    tokens.flush()
    np.save(folder / "labels.npy", np.asarray(source.labels, np.int64))
    os.replace(partial, folder / "tokens.npy")
    write_json(folder / "meta.json", dataclasses.asdict(meta))
    progress_file.unlink(missing_ok=True)


def _resume_at(folder: Path, meta: TokenCacheMeta) -> int | None:
    """The first image still to encode; None when the cache is whole."""
    for name in ("meta.json", "progress.json"):
        path = folder / name
        if not path.exists():
            continue
        saved = json.loads(path.read_text())
        saved_meta = saved if name == "meta.json" else saved["meta"]
        if different := differences(saved_meta, dataclasses.asdict(meta)):
            raise ValueError(
                f"{folder}: holds a token cache of other images or settings: {'; '.join(different)}; "
                "choose another folder or delete it"
            )
        if name == "meta.json":
            return None
        if (folder / "tokens.partial.npy").exists():
            return int(saved["done"])
    return 0


def validate_token_cache(folder: str | Path, check_range: bool = True) -> TokenCache:
    """Open a cache; raises ValueError naming the file, what was expected and what was found."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        reason = (
            "an unfinished cache: run the same tokenize command again"
            if (folder / "progress.json").exists()
            else "no meta.json"
        )
        raise ValueError(f"{folder}: expected a token cache, got {reason}")
    try:
        raw = json.loads((folder / "meta.json").read_text())
        meta = TokenCacheMeta(**_renamed(raw))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'}: expected token cache metadata, got {error}") from error
    if meta.format not in (1, _FORMAT):
        raise ValueError(f"{folder / 'meta.json'}: expected format {_FORMAT}, got {meta.format}")
    tokens = _open_array(
        folder / "tokens.npy", (meta.num_images, meta.num_crops, meta.num_tokens), token_dtype(meta.codebook_size)
    )
    labels = _open_array(folder / "labels.npy", (meta.num_images,), np.dtype(np.int64))
    if labels.min() < 0 or labels.max() >= len(meta.class_names):
        raise ValueError(
            f"{folder / 'labels.npy'}: expected labels in 0..{len(meta.class_names) - 1}, "
            f"got {labels.min()}..{labels.max()}"
        )
    if check_range and int(tokens.max()) >= meta.codebook_size:
        largest = int(tokens.max())
        raise ValueError(f"{folder / 'tokens.npy'}: expected tokens below {meta.codebook_size}, got {largest}")
    return TokenCache(tokens, labels, meta)


def _renamed(meta: dict[str, Any]) -> dict[str, Any]:
    """Metadata as alitok_fast 0.1 wrote it, under today's names."""
    names = {"images": "num_images", "crops": "num_crops", "tokens": "num_tokens", "classes": "class_names"}
    return {names.get(name, name): value for name, value in meta.items()} if meta.get("format") == 1 else meta


def _open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a whole .npy array, got {error}") from error
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path}: expected {dtype} of shape {shape}, got {array.dtype} of shape {array.shape}")
    return array
