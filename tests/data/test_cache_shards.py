"""Shards: together they are the cache of one writer, to the byte; anything else is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from noise import META, Source, encode

from alitok_fast.data import cache_writer, merge_shards, validate_token_cache, write_token_cache
from alitok_fast.data.cache_shards import ShardOfImages, parse_shard, shard_images
from alitok_fast.data.token_cache import Shard, TokenCacheMeta


def write(folder: Path, images: range, meta: TokenCacheMeta = META) -> Path:
    write_token_cache(folder, ShardOfImages(Source(), images), encode, meta.of_shard(images), 1, workers=1)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"shard{number}", shard_images(5, 1, number, 3)) for number in (1, 2, 3)]


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    write_token_cache(tmp_path / "whole", Source(), encode, META, 1, workers=1)
    return contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_merged_shards_are_the_whole_cache(tmp_path: Path, shards, whole, order) -> None:
    merged = merge_shards([shards[i] for i in order], tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    assert merged.fingerprint() == validate_token_cache(tmp_path / "whole").fingerprint()
    assert all(file.is_dir() for file in shards)


def test_a_shard_is_a_cache_of_its_images(shards: list[Path]) -> None:
    cache = validate_token_cache(shards[1])
    assert cache.meta.images == range(1, 3) and cache.meta.shard == Shard(1, 5)
    assert (cache.labels == [1, 0]).all() and cache.meta.whole == META
    assert cache.summary == "noise: 2 images x 2 crops x 3 tokens in 2 classes, from image 1 on of 5"


def test_a_killed_merge_goes_on(tmp_path: Path, shards, whole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_writer, "_BATCHES_PER_BLOCK", 1)

    def killed(pieces):
        yield from pieces[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_shards(shards, tmp_path / "out", progress=killed)
    with pytest.raises(ValueError, match="an unfinished cache"):
        validate_token_cache(tmp_path / "out")
    copied: list = []
    merge_shards(shards, tmp_path / "out", progress=lambda pieces: copied.extend(pieces) or pieces)
    assert len(copied) == 1 and contents(tmp_path / "out") == whole


@pytest.mark.parametrize(("size", "batch_size", "count"), [(5, 1, 5), (100, 7, 3), (64, 64, 1), (1000, 8, 9)])
def test_shares_are_whole_batches_and_even(size: int, batch_size: int, count: int) -> None:
    shares = [shard_images(size, batch_size, number, count) for number in range(1, count + 1)]
    assert [i for share in shares for i in share] == list(range(size))
    assert all(share.start % batch_size == 0 for share in shares)
    batches = [-(-len(share) // batch_size) for share in shares]
    assert max(batches) - min(batches) <= 1 and min(batches) > 0


def test_more_shards_than_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="shard: expected at most 2 shards, one per batch of 4, got 3"):
        shard_images(5, 4, 1, 3)


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "-1/4", "1/4/4", "a/b", "1.0/4", "1/99999999999"])
def test_shards_are_numbered_from_one(text: str) -> None:
    assert parse_shard("4/4") == (4, 4)
    with pytest.raises(ValueError, match="shard: expected I/N with I from 1 to N, such as 2/8, got "):
        parse_shard(text)


def test_what_is_missing_or_twice_is_named(tmp_path: Path, shards: list[Path]) -> None:
    out = tmp_path / "out"
    for some, message in (
        (shards[:2], "expected one that begins with image 3 of 5, got none"),
        (shards[1:], "expected one that begins with image 0 of 5, got none"),
        (shards[::2], "expected one that begins with image 1 of 5, got none"),
        ([*shards, shards[1]], "shard1: expected a shard that begins with image 3, got 1, which another one holds"),
        ([*shards, write(tmp_path / "else", range(2, 4))], "expected a shard that begins with image 3, got 2"),
        ([], "shards: expected at least one"),
    ):
        with pytest.raises(ValueError, match=message.replace("shard1", "shard2")):
            merge_shards(some, out)
    assert os.listdir(out) == []


@pytest.mark.parametrize("name", ["tokenizer", "data", "source", "image_size", "class_names"])
def test_shards_of_other_data_are_refused(tmp_path: Path, shards, name: str) -> None:
    other = {"image_size": 5, "class_names": ["a", "c"]}.get(name, "other")
    shards[1] = write(tmp_path / "other", range(1, 3), dataclasses.replace(META, **{name: other}))
    with pytest.raises(ValueError, match=rf"other: expected a shard of the same data as .*shard1: {name}"):
        merge_shards(shards, tmp_path / "out")


def test_whole_caches_and_the_output_itself_are_no_shards(tmp_path: Path, shards, whole) -> None:
    with pytest.raises(ValueError, match="whole: expected a shard .*, got a token cache of all images"):
        merge_shards([tmp_path / "whole"], tmp_path / "out")
    with pytest.raises(ValueError, match="out: expected another folder than the shards"):
        merge_shards(shards, shards[0], force=True)
    assert len(validate_token_cache(shards[0])) == 1


def test_other_files_are_kept(tmp_path: Path, shards: list[Path]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokens.npy").write_text("mine")
    with pytest.raises(ValueError, match="out: expected a new folder or a token cache"):
        merge_shards(shards, tmp_path / "out")
    merge_shards(shards, tmp_path / "out", force=True)


def test_a_damaged_shard_is_named(tmp_path: Path, shards: list[Path]) -> None:
    np.save(shards[1] / "tokens.npy", np.full((2, 2, 3), 60, np.uint16))
    with pytest.raises(ValueError, match=r"shard2.tokens.npy: expected tokens below 50, got 60"):
        merge_shards(shards, tmp_path / "out")


@pytest.mark.parametrize("shard", [{"first": 4, "total": 5}, {"first": -1, "total": 5}, {"first": 0}, [0, 5], "x", 1,
                                   {"first": 0.0, "total": 5}, {"first": 0, "total": 10**12}])  # fmt: skip
def test_the_shard_in_the_metadata_is_checked(shards: list[Path], shard) -> None:
    path = shards[1] / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shard": shard}))
    with pytest.raises(ValueError, match="meta.json: shard: expected the first image and the total of images around 2"):
        validate_token_cache(path.parent)
