"""`alitok-fast tokens ...`: what is printed, what is written, and one line for each mistake."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from noise import META, Source, encode

from alitok_fast.cli import main
from alitok_fast.data import cache_writer, validate_token_cache, write_token_cache
from alitok_fast.data.cache_shards import ShardOfImages
from alitok_fast.models import save_model
from alitok_fast.models.tokenizer import encoder_fingerprint


@pytest.fixture
def run(monkeypatch, capsys):
    """run(status, *arguments) -> what was printed, for status 0, else the complaint."""

    def call(status: int, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["alitok-fast", "tokens", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        assert int(exit_.value.code or 0) == status, err
        return err if status else out

    return call


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_token_cache(tmp_path / "cache", Source(), encode, META, 1, workers=1)
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_export_and_import(run, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    exported = ["--cache", cache, "--out", tmp_path / "p", "--rows-per-file", 2, "--no-progress"]
    assert f"wrote 3 files into {tmp_path / 'p'}" in run(0, "export", *exported)
    assert "expected a folder without parquet files" in run(2, "export", *exported)
    out = ["import", "--parquet", tmp_path / "p", "--out", tmp_path / "back", "--no-progress"]
    assert "noise: 5 images x 2 crops x 3 tokens in 2 classes, 50 codes, of 4 pixels" in run(0, *out)
    assert contents(tmp_path / "back") == contents(cache)
    assert "codebook_size: expected 50, got 60" in run(2, *out, "--codebook-size", 60)


def test_import_takes_sizes_from_the_tokenizer(run, tmp_path: Path, tiny_tokenizer) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    model = tiny_tokenizer()
    save_model(tmp_path / "tokenizer", model)
    (tmp_path / "names.txt").write_text("cat\ndog\n\n")
    tokens = np.random.default_rng(0).integers(0, 32, (3, 2 * model.config.num_tokens))
    pq.write_table(pa.table({"codes": tokens.tolist(), "y": [1, 0, 1]}), tmp_path / "x.parquet")
    given = ["--parquet", tmp_path / "x.parquet", "--tokens-column", "codes", "--label-column", "y", "--no-progress"]
    given += ["--tokenizer", tmp_path / "tokenizer", "--class-names", tmp_path / "names.txt", "--out", tmp_path / "out"]
    assert "image_size: expected 16 as in the tokenizer, got 32" in run(2, "import", *given, "--image-size", 32)
    assert "3 images x 2 crops x 21 tokens in 2 classes, 32 codes, of 16 pixels" in run(0, "import", *given)
    meta = validate_token_cache(tmp_path / "out").meta
    assert meta.tokenizer == encoder_fingerprint(model.state_dict()) and meta.class_names == ["cat", "dog"]
    (tmp_path / "names.txt").write_text("\n")
    assert "names.txt: expected names, one per line, got none" in run(2, "import", *given)
    (tmp_path / "names.txt").write_bytes(b"\xff")
    assert "names.txt: expected names in UTF-8" in run(2, "import", *given)


def test_merge(run, cache: Path, tmp_path: Path) -> None:
    for name, images in (("one", range(2)), ("two", range(2, 5))):
        write_token_cache(tmp_path / name, ShardOfImages(Source(), images), encode, META.of_shard(images), 1)
    assert "5 images" in run(0, "merge", tmp_path / "two", tmp_path / "one", "--out", tmp_path / "out", "--no-progress")
    assert contents(tmp_path / "out") == contents(cache)
    assert "shards: expected one that begins" in run(2, "merge", tmp_path / "two", "--out", tmp_path / "out2")


def test_info(run, cache: Path, tmp_path: Path, monkeypatch) -> None:
    said = run(0, "info", cache)
    assert "images:           5\n" in said and "classes:          2 (a, b)\n" in said and "unfinished" not in said
    assert "tokenizer:        abc\n" in said and "shard" not in said
    monkeypatch.setattr(cache_writer, "_BATCHES_PER_BLOCK", 1)
    images, calls = range(1, 5), []

    def killed(pictures):
        calls.append(1)
        return encode(pictures) if len(calls) < 3 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        write_token_cache(tmp_path / "x", ShardOfImages(Source(), images), killed, META.of_shard(images), 1)
    said = run(0, "info", tmp_path / "x")
    assert said.startswith("unfinished: 2 of 4 images\n") and "shard:            from image 1 on, of 5\n" in said
    assert "expected a token cache, got no meta.json" in run(2, "info", tmp_path)


def test_check(run, cache: Path) -> None:
    tokens = validate_token_cache(cache).tokens.copy()
    said = run(0, "check", cache, "--no-progress").splitlines()
    used = len(np.unique(tokens))
    assert said[1].startswith(f"codes: {used} of 50 used ({used / 50:.1%}), perplexity ")
    assert said[2] == "classes: 2 of 2 with images, 2 to 3 in each"
    tokens[4] = tokens[0]
    np.save(cache / "tokens.npy", tokens)
    said = run(0, "check", cache, "--no-progress")
    assert "warning: images: 1 have the tokens of an earlier one, such as 4 those of 0\n" in said
    tokens[1, 1, 2] = 50
    np.save(cache / "tokens.npy", tokens)
    assert "tokens.npy: expected tokens below 50, got 50" in run(2, "check", cache)
