"""Writing a token cache: space reserved first, earlier work checked before it is continued, links never followed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from alitok_fast.data.cache_progress import PARTIAL_NAME, PartialTokens, read_progress
from alitok_fast.data.checks import require_choice, require_count
from alitok_fast.data.reading import default_workers, read_ahead
from alitok_fast.data.sources import ImageSource, check_picture, check_source
from alitok_fast.data.token_cache import (
    LABELS_NAME,
    META_NAME,
    PROGRESS_NAME,
    TOKENS_NAME,
    TokenCacheMeta,
    read_meta,
)
from alitok_fast.data.transforms import CROP_COUNTS, cache_crops, to_tensor
from alitok_fast.storage.files import differences, leftovers, locked, write_json
from alitok_fast.storage.images import write_npy

LOCK_NAME = ".tokenize.lock"
_NAMES = (META_NAME, PROGRESS_NAME, TOKENS_NAME, LABELS_NAME, PARTIAL_NAME)
_BATCHES_PER_BLOCK = 16  # a block is flushed and entered in the progress file with its checksum


def write_token_cache(
    folder: str | Path,
    source: ImageSource,
    encode: Callable[[Tensor], Tensor],
    meta: TokenCacheMeta,
    batch_size: int = 64,
    progress: Callable[[Iterable], Iterable] = iter,
    workers: int | None = None,
    force: bool = False,
) -> None:
    """Encode every image of `source` (see data.sources) into `folder`; continue an interrupted run.

    `encode` takes (B, 3, S, S) in [0, 1] and gives (B, N) int64. Pictures are read by `workers` threads, one batch
    ahead. Raises ValueError when tokens out of range come back, when another process writes into the folder, when it
    holds a cache of other images or settings, or files under the cache's names that no cache wrote (`force` removes
    all of these first and begins anew); OSError naming the file when the disk is full, before anything is encoded.
    """
    require_count("batch_size", batch_size)
    workers = default_workers() if workers is None else require_count("workers", workers)
    require_choice("num_crops", meta.num_crops, CROP_COUNTS)
    check_source(source)
    with writer_lock(folder):
        pieces = _encoded(source, encode, meta, batch_size, progress, workers)
        fill_cache(folder, meta, source.labels, pieces, force)


@contextlib.contextmanager
def writer_lock(folder: str | Path) -> Iterator[None]:
    """Inside the block nobody else writes into `folder`, which is made where it is not there.

    Raises ValueError where it is a file, or where another process is writing into it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK_NAME):
        for file in leftovers(folder, _NAMES):
            file.unlink()
        yield


def fill_cache(
    folder: str | Path,
    meta: TokenCacheMeta,
    labels: np.ndarray,
    pieces: Callable[[int], Iterable[np.ndarray]],
    force: bool = False,
) -> None:
    """Write a cache, or go on with one; inside `writer_lock`.

    `labels` (images,) integers. `pieces(done)` yields the tokens of all images from number `done` on, in order, as
    (images, crops, N) of any number of images. Raises as `write_token_cache`.
    """
    folder = Path(folder)
    if len(labels) != meta.num_images:
        raise ValueError(f"labels: expected {meta.num_images}, one per image, got {len(labels)}")
    blocks = begin_cache(folder, meta, force)
    if blocks is None:
        return
    with PartialTokens(folder, meta, blocks) as partial:
        for number, tokens in enumerate(pieces(partial.done), 1):
            partial.append(tokens)
            if number % _BATCHES_PER_BLOCK == 0:
                partial.enter()
        partial.enter()
        if partial.done != meta.num_images:
            raise ValueError(f"{folder}: expected the tokens of {meta.num_images} images, got {partial.done}")
    write_npy(folder / LABELS_NAME, np.asarray(labels, np.int64))
    os.replace(folder / PARTIAL_NAME, folder / TOKENS_NAME)
    write_json(folder / META_NAME, meta.to_dict())
    (folder / PROGRESS_NAME).unlink(missing_ok=True)


def _encoded(source, encode, meta, batch_size, progress, workers) -> Callable[[int], Iterator[np.ndarray]]:
    def crops_of(index: int) -> np.ndarray:
        return cache_crops(check_picture(source.image(index), index), meta.image_size, meta.num_crops)

    def pieces(done: int) -> Iterator[np.ndarray]:
        firsts = range(done, meta.num_images, batch_size)
        batches = (range(first, min(first + batch_size, meta.num_images)) for first in firsts)
        read = read_ahead(batches, crops_of, workers)
        for _, crops in zip(progress(firsts), read, strict=True):
            images: np.ndarray = np.concatenate(crops)
            found = encode(to_tensor(images))
            smallest, largest = int(found.min()), int(found.max())
            if found.shape != (len(images), meta.num_tokens) or smallest < 0 or largest >= meta.codebook_size:
                raise ValueError(
                    f"encode: expected ({len(images)}, {meta.num_tokens}) tokens below {meta.codebook_size}, "
                    f"got shape {tuple(found.shape)} in {smallest}..{largest}"
                )
            yield found.cpu().numpy().reshape(-1, meta.num_crops, meta.num_tokens)

    return pieces


def begin_cache(folder: Path, meta: TokenCacheMeta, force: bool) -> list[list[int]] | None:
    """The blocks that an earlier run entered in the progress file; None when the cache is whole already.

    Raises ValueError where `folder` holds something else, which `force` removes.
    """
    if force:
        for name in _NAMES:
            (folder / name).unlink(missing_ok=True)
    if problem := _problem(folder, meta):
        raise ValueError(f"{problem}; choose another folder, or write over it with force (--force)")
    if (folder / META_NAME).exists():
        return None
    return read_progress(folder / PROGRESS_NAME)[1] if (folder / PROGRESS_NAME).exists() else []


def _problem(folder: Path, meta: TokenCacheMeta) -> str | None:
    """Why a run with these settings must not write into the folder."""
    there = [name for name in _NAMES if os.path.lexists(folder / name)]
    if not there:
        return None
    try:
        if META_NAME in there:
            saved = read_meta(folder / META_NAME)
        elif PROGRESS_NAME in there:
            saved, _ = read_progress(folder / PROGRESS_NAME)
        else:
            return f"out: expected a new folder or a token cache, got {folder}, which holds another {there[0]}"
    except (ValueError, OSError) as error:
        return f"out: expected a new folder or a token cache, got {folder}: {error}"
    unknown = () if saved.data else ("data",)  # an older cache does not say
    if different := differences(saved.to_dict(), meta.to_dict(), ("format", *unknown)):
        return f"{folder}: holds a token cache of other images or settings: {'; '.join(different)}"
    return None
