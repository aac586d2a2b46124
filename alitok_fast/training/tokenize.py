"""Encode a data set once, for the generator's training: in one process, in several together, or a shard of it."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from alitok_fast.data import (
    ImageSource,
    TokenCache,
    check_source,
    source_fingerprint,
    validate_token_cache,
    write_token_cache,
)
from alitok_fast.data.cache_shards import ShardOfImages, copy_shards, shard_images
from alitok_fast.data.cache_writer import begin_cache, writer_lock
from alitok_fast.data.checks import require_choice, require_count
from alitok_fast.data.token_cache import SHARDS_NAME, TokenCacheMeta
from alitok_fast.data.transforms import CROP_COUNTS, PREPARATION
from alitok_fast.inference.image_encoder import ImageEncoder
from alitok_fast.models.tokenizer import Tokenizer, encoder_fingerprint
from alitok_fast.progress import tracked
from alitok_fast.training.ranks import Ranks


def tokenize(
    tokenizer: Tokenizer,
    source: ImageSource,
    out: str | Path,
    crops: int = 10,
    batch_size: int = 64,
    progress: bool = True,
    workers: int | None = None,
    force: bool = False,
    shard: tuple[int, int] | None = None,
    ranks: Ranks | None = None,
    dtype: torch.dtype | None = None,
) -> TokenCache:
    """Write the token cache of an image source (alitok_fast.data.open_source) to the folder `out`, or finish it.

    `crops` is 1 (centre), 2 (and its mirror image) or 10 (section 3.3). The
    stage does not matter: stage 2 keeps the encoder and the codebook of stage 1.
    `workers` threads read pictures (one per core, at most 8, if not given).

    `shard` (I, N) with I from 1 writes the I-th of N shards only, for `alitok_fast.data.merge_shards`. With `ranks`
    every process of the torch.distributed group makes the same call and writes its share; the cache is that of a single
    process.
    `dtype` is that of `ImageEncoder`: less precise ones are faster and change some tokens (docs/precision.md).
    Raises as `write_token_cache`; `force` writes over what it would refuse.
    """
    require_count("batch_size", batch_size)
    require_choice("crops", require_count("crops", crops), CROP_COUNTS)
    check_source(source)
    ranks = ranks or Ranks()
    if shard is not None and ranks.world > 1:
        raise ValueError(
            f"shard: expected none where {ranks.world} processes write together, got {shard[0]}/{shard[1]}"
        )
    config, encoder = tokenizer.config, ImageEncoder(tokenizer.eval(), dtype)
    meta = TokenCacheMeta(
        num_images=len(source),
        num_crops=crops,
        num_tokens=config.num_tokens,
        codebook_size=config.codebook_size,
        image_size=config.image_size,
        class_names=list(source.class_names),
        source=source.name,
        tokenizer=encoder_fingerprint(tokenizer.state_dict()),
        data=_data(source, encoder),
    )

    def encode(images: Tensor) -> Tensor:
        return encoder(images.to(tokenizer.device))

    def write(folder: Path, images: range | None, title: str, force: bool = False) -> None:
        write_token_cache(
            folder,
            source if images is None else ShardOfImages(source, images),
            encode,
            meta if images is None else meta.of_shard(images),
            batch_size,
            lambda batches: tracked(title, batches, progress and ranks.main),
            workers,
            force,
        )

    out = Path(out)
    with torch.inference_mode():
        if shard is not None:
            write(out, shard_images(len(source), batch_size, *shard), f"tokenize {shard[0]}/{shard[1]}", force)
        elif ranks.world > 1 or (out / SHARDS_NAME).is_dir():
            _together(out, meta, batch_size, write, force, ranks)
        else:
            write(out, None, "tokenize", force)
    return validate_token_cache(out, check_range=ranks.main)


def _data(source: ImageSource, encoder: ImageEncoder) -> str:
    """What decides the tokens besides the weights: the images, their preparation, the encoder's precision."""
    precision = "" if encoder.dtype == torch.float32 else f"-{str(encoder.dtype).removeprefix('torch.')}"
    return f"{source_fingerprint(source)}-{PREPARATION}{precision}"


def _together(out: Path, meta: TokenCacheMeta, batch_size: int, write: Callable, force: bool, ranks: Ranks) -> None:
    """Each process writes every world-th shard, under out/shards; the main one then puts them together.

    The number of shards is that of the processes which began, whoever goes on.
    """
    world = ranks.world
    with writer_lock(out) if ranks.main else contextlib.nullcontext():
        batches = -(-meta.num_images // batch_size)
        count = ranks.from_main(_begun(out, meta, force, min(world, batches)) if ranks.main else None)
        if not count:
            return
        folders = [out / SHARDS_NAME / f"{number:05}-of-{count:05}" for number in range(1, count + 1)]
        for number in range(ranks.rank + 1, count + 1, world):
            title = f"tokenize, process 1 of {world}" if world > 1 else f"tokenize {number}/{count}"
            write(folders[number - 1], shard_images(meta.num_images, batch_size, number, count), title)
        ranks.barrier()
        if ranks.main:
            copy_shards(folders, out)
            shutil.rmtree(out / SHARDS_NAME)
        ranks.barrier()


def _begun(out: Path, meta: TokenCacheMeta, force: bool, count: int) -> int:
    """How many shards there are in `out`, or will be; 0 where the cache is whole already."""
    shards = out / SHARDS_NAME
    names = sorted(file.name for file in shards.iterdir()) if shards.is_dir() else []
    counts = {match[1] if (match := re.fullmatch(r"\d{5}-of-(\d{5})", name)) else name for name in names}
    if len(counts) > 1 or not all(map(str.isdigit, counts)):
        raise ValueError(f"out: expected shards of one number of processes in {shards}, got {', '.join(names[:3])}")
    blocks = begin_cache(out, meta, force)
    if names and (force or blocks is None):
        shutil.rmtree(shards)
        names = []
    if blocks and not names:
        raise ValueError(
            f"out: expected a new folder or shards, got {out}, which one process began: let one go on, "
            "or write over it with force (--force)"
        )
    return 0 if blocks is None else int(counts.pop()) if names else count
