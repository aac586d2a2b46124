"""Shards of a token cache: which images each of several writers encodes, and how their caches become one.

A shard is a token cache of its own, of consecutive images, whose metadata say which of the data set they are. Shares
begin where a batch of a single writer would, so that each image is encoded in the same company as without shards, and
not even rounding differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from alitok_fast.data.cache_writer import fill_cache, writer_lock
from alitok_fast.data.checks import require_count
from alitok_fast.data.sources import ImageSource
from alitok_fast.data.token_cache import TokenCache, validate_token_cache
from alitok_fast.storage.files import differences

_PIECE = 1024  # images copied together


def parse_shard(text: str) -> tuple[int, int]:
    """The number of a shard, from 1, and how many there are: (2, 8) for "2/8"."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"shard: expected I/N with I from 1 to N, such as 2/8, got {text!r}")
    return number, count


def shard_images(num_images: int, batch_size: int, number: int, count: int) -> range:
    """The images of shard `number`, from 1, of `count`: whole batches, as equally many as can be.

    Raises ValueError where there are more shards than batches.
    """
    batches = -(-num_images // require_count("batch_size", batch_size))
    if count > batches:
        raise ValueError(f"shard: expected at most {batches} shards, one per batch of {batch_size}, got {count}")
    first, stop = (batches * part // count * batch_size for part in (number - 1, number))
    return range(first, min(stop, num_images))


class ShardOfImages:
    """The consecutive `images` of a source, as an ImageSource."""

    def __init__(self, source: ImageSource, images: range) -> None:
        self.name, self.class_names = source.name, source.class_names
        self.labels = np.asarray(source.labels)[images.start : images.stop]
        self._source, self._first = source, images.start

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        return self._source.image(self._first + index)


def merge_shards(
    shards: Sequence[str | Path],
    out: str | Path,
    force: bool = False,
    progress: Callable[[Iterable], Iterable] = iter,
) -> TokenCache:
    """Put shards, in any order, together into the token cache `out`, or finish doing so; the shards stay.

    The cache is, bit for bit, that of a single writer. Raises ValueError naming shards that are missing, there twice or
    of other data, and as `write_token_cache` where `out` is something else.
    """
    with writer_lock(out):
        copy_shards(shards, out, force, progress)
    return validate_token_cache(out)


def copy_shards(
    shards: Sequence[str | Path], out: str | Path, force: bool = False, progress: Callable[[Iterable], Iterable] = iter
) -> None:
    """`merge_shards`, inside `writer_lock`."""
    parts = _opened(shards)
    for folder, _ in parts:
        if Path(out).exists() and Path(out).samefile(folder):
            raise ValueError(f"out: expected another folder than the shards, got {out}")
    labels: np.ndarray = np.concatenate([cache.labels for _, cache in parts])

    def pieces(done: int) -> Iterator[np.ndarray]:
        begins = [
            (cache.tokens, first)
            for _, cache in parts
            for first in range(max(0, done - cache.meta.images.start), len(cache), _PIECE)
        ]
        for tokens, first in progress(begins):
            yield tokens[first : first + _PIECE]

    fill_cache(out, parts[0][1].meta.whole, labels, pieces, force)


def _opened(shards: Sequence[str | Path]) -> list[tuple[Path, TokenCache]]:
    """The shards in the order of their images, once they are known to hold each image once, of the same data."""
    if not shards:
        raise ValueError("shards: expected at least one, got none")
    parts = [(Path(folder), validate_token_cache(folder)) for folder in shards]
    whole = parts[0][1].meta.whole
    for folder, cache in parts:
        if cache.meta.shard is None:
            raise ValueError(f"{folder}: expected a shard (tokenize --shard), got a token cache of all images")
        if different := differences(whole.to_dict(), cache.meta.whole.to_dict()):
            raise ValueError(f"{folder}: expected a shard of the same data as {parts[0][0]}: {'; '.join(different)}")
    parts.sort(key=lambda part: part[1].meta.images.start)
    here = 0
    for folder, cache in parts:
        first = cache.meta.images.start
        if first < here:
            raise ValueError(
                f"{folder}: expected a shard that begins with image {here}, got {first}, which another one holds; "
                "shards fit together if they were written with the same N and batch_size"
            )
        if first > here:
            break
        here += len(cache)
    if here < whole.num_images:
        raise ValueError(f"shards: expected one that begins with image {here} of {whole.num_images}, got none")
    return parts
