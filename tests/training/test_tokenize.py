"""Tokenizing in shards and in several processes: the files of one process, to the byte."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.conftest import GENERATOR, GENERATOR_TRAINING, TOKENIZER, write_stripes

from alitok_fast.data import cache_writer, merge_shards, open_source, validate_token_cache
from alitok_fast.data.cache_progress import begun_cache
from alitok_fast.inference.image_encoder import ImageEncoder
from alitok_fast.models import Generator, Tokenizer, save_model
from alitok_fast.training import tokenize as module
from alitok_fast.training.generator import GeneratorTask
from alitok_fast.training.ranks import Ranks
from alitok_fast.training.tokenize import tokenize

ROOT = Path(__file__).resolve().parents[2]


def model() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(TOKENIZER).eval()


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("stripes"))


@pytest.fixture
def single(tmp_path: Path, stripes: Path) -> dict[str, bytes]:
    return run(stripes, tmp_path / "single")


def run(data: Path, out: Path, **options) -> dict[str, bytes]:
    source = open_source(data, image_size=TOKENIZER.image_size)
    tokenize(model(), source, out, **{"crops": 2, "batch_size": 5, "progress": False, "workers": 1, **options})
    return {file.name: file.read_bytes() for file in out.iterdir()}


def begin(data: Path, out: Path, number: int, count: int) -> None:
    """As the process of `number` leaves it that was killed after its first shard."""
    run(data, out / "shards" / f"{number:05}-of-{count:05}", shard=(number, count))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_make_the_cache_of_one_process(tmp_path: Path, stripes: Path, single, count: int) -> None:
    shards = [tmp_path / f"{number}" for number in range(1, count + 1)]
    for number, folder in enumerate(shards, 1):
        run(stripes, folder, shard=(number, count))
    merge_shards(shards, tmp_path / "merged")
    assert {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()} == single


def test_one_process_finishes_what_several_began(tmp_path: Path, stripes: Path, single, monkeypatch) -> None:
    out = tmp_path / "out"
    begin(stripes, out, 2, 3)
    assert begun_cache(out) == (validate_token_cache(tmp_path / "single").meta, 10)
    with pytest.raises(ValueError, match="out: expected a token cache, got an unfinished cache"):
        validate_token_cache(out)
    written = []
    real = module.write_token_cache
    monkeypatch.setattr(
        module, "write_token_cache", lambda folder, *a: (written.append(folder.name), real(folder, *a))[1]
    )
    assert run(stripes, out) == single
    assert written == ["00001-of-00003", "00002-of-00003", "00003-of-00003"]
    assert run(stripes, out) == single and len(written) == 4  # whole: nothing is left to be done


def test_what_one_process_began_is_not_begun_anew(tmp_path: Path, stripes: Path, single, monkeypatch) -> None:
    monkeypatch.setattr(cache_writer, "_BATCHES_PER_BLOCK", 1)
    out, calls = tmp_path / "out", []
    real = ImageEncoder.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            ImageEncoder, "__call__", lambda self, x: (calls.append(1), real(self, x) if len(calls) < 3 else 1 / 0)[1]
        )
        with pytest.raises(ZeroDivisionError):
            run(stripes, out)
    monkeypatch.setattr(Ranks, "from_main", lambda self, value: value)
    with pytest.raises(ValueError, match="which one process began: let one go on, or write over it with force"):
        run(stripes, out, ranks=Ranks(0, 2))
    assert run(stripes, out) == single


def test_other_folders_among_the_shards_are_refused(tmp_path: Path, stripes: Path) -> None:
    out = tmp_path / "out"
    (out / "shards" / "mine").mkdir(parents=True)
    for force in (False, True):
        with pytest.raises(ValueError, match="expected shards of one number of processes in .*shards, got mine"):
            run(stripes, out, force=force)
    (out / "shards" / "mine").rmdir()
    begin(stripes, out, 1, 3)
    begin(stripes, out, 1, 2)
    with pytest.raises(ValueError, match="got 00001-of-00002, 00001-of-00003"):
        run(stripes, out)


def test_shards_of_other_settings_are_refused_or_forced(tmp_path: Path, stripes: Path, single) -> None:
    out = tmp_path / "out"
    begin(stripes, out, 1, 3)
    with pytest.raises(ValueError, match="00001-of-00003: holds a token cache of other images or settings: num_crops"):
        run(stripes, out, crops=1)
    assert run(stripes, out, force=True) == single


def test_a_shard_of_a_share_is_refused(tmp_path: Path, stripes: Path) -> None:
    with pytest.raises(ValueError, match="shard: expected none where 2 processes write together, got 1/2"):
        run(stripes, tmp_path / "out", shard=(1, 2), ranks=Ranks(0, 2))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_writes_the_cache_of_one_process(tmp_path: Path, stripes: Path, processes: int) -> None:
    save_model(tmp_path / "tokenizer", model())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["-m", "alitok_fast.cli", "tokenize", "--data", stripes, "--tokenizer", tmp_path / "tokenizer"]
    command += ["--crops", "2", "--batch-size", "5", "--no-progress", "--out"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]

    def start(*arguments: object) -> str:
        words = [sys.executable, *map(str, arguments)]
        return subprocess.run(words, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout

    start(*command, tmp_path / "single")
    said = start(*launcher, *command, tmp_path / "out")
    assert said.count("24 images x 2 crops") == 1 and said.count("24 pictures") == 1
    folders = [tmp_path / "single", tmp_path / "out"]
    one, other = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert one == other
    assert start(*launcher, *command, tmp_path / "out")  # whole
    assert len(validate_token_cache(tmp_path / "out")) == 24


def test_of_an_unknown_tokenizer_nothing_is_claimed(tmp_path: Path, stripes: Path, single) -> None:
    """Imported caches may not know it; the model then goes with any tokenizer of its sizes."""
    cache = validate_token_cache(tmp_path / "single")
    for known, expected in ((cache.meta.tokenizer, cache.meta.tokenizer), ("", None)):
        other = dataclasses.replace(cache, meta=dataclasses.replace(cache.meta, tokenizer=known))
        task = GeneratorTask(Generator(GENERATOR), other, GENERATOR_TRAINING)
        assert task.provenance()["tokenizer"] == expected
