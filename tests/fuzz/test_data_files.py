"""Damaged IDX files, token caches and run folders: a valid result, or the library's one error naming a file."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from noise import META, Source, encode

from alitok_fast.data import IdxImages, open_source, validate_token_cache, write_token_cache
from alitok_fast.data.parquet import import_parquet
from alitok_fast.data.parquet_export import export_parquet
from alitok_fast.data.parquet_facts import TokenFacts
from alitok_fast.training.config import GeneratorTrainConfig
from alitok_fast.training.run_folder import RunFolder, read_settings

COMMON = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
WORDS = (
    b"",
    b"\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"[" * 3000,
    b"null",
    b"-1",
    b"1e999",
    b"PK\x03\x04",
    b'"x"',
)
SETTINGS = GeneratorTrainConfig(steps=8, warmup=0)


@st.composite
def damage(draw, names: tuple[str, ...]) -> list[tuple[str, str, int, bytes]]:
    """What happens to which file: replaced, removed, cut, written over or spliced at a place in thousandths."""
    kinds = st.sampled_from(("cut", "over", "insert", "replace", "remove"))
    text = st.one_of(st.sampled_from(WORDS), st.binary(min_size=1, max_size=8))
    return draw(st.lists(st.tuples(st.sampled_from(names), kinds, st.integers(0, 1000), text), min_size=1, max_size=3))


def apply(folder: Path, steps: list[tuple[str, str, int, bytes]]) -> None:
    for name, kind, place, data in steps:
        path = folder / name
        if not path.is_file():
            continue
        if kind == "remove":
            path.unlink()
            continue
        raw = path.read_bytes()
        at = len(raw) * place // 1000
        tail = {"cut": b"", "over": data + raw[at + len(data) :], "insert": data + raw[at:], "replace": data}[kind]
        path.write_bytes((b"" if kind == "replace" else raw[:at]) + tail)


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def names_it(error: ValueError, folder: Path) -> None:
    assert str(folder) in str(error) and len(str(error).splitlines()) == 1, str(error)


# ---- IDX ----


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idx")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 4, 5), np.uint8), rng.integers(0, 3, 6).astype(np.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    with gzip.open(folder / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">II", 0x801, 6) + labels.tobytes())
    (folder / "classes.txt").write_text("\n".join(f"class {i}" for i in range(256)))
    return folder


IDX_DAMAGE = damage(("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz", "classes.txt"))


def check_idx(folder: Path, steps) -> None:
    apply(folder, steps)
    try:
        source = open_source(folder, image_size=8, report=lambda text: None)
    except ValueError as error:
        names_it(error, folder)
        return
    assert isinstance(source, IdxImages) and len(source.class_names) > source.labels.max()
    assert source.image(len(source) - 1).shape[2] == 3


@settings(max_examples=300, **COMMON)
@given(IDX_DAMAGE)
def test_damaged_idx(idx: Path, steps) -> None:
    check_idx(copy(idx, idx.with_name("damaged-idx")), steps)


@pytest.mark.slow
@settings(max_examples=3000, **COMMON)
@given(IDX_DAMAGE)
def test_much_damaged_idx(idx: Path, steps) -> None:
    check_idx(copy(idx, idx.with_name("damaged-idx")), steps)


# ---- token caches ----


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole/ and, killed after two of five images, begun/."""
    folder = tmp_path_factory.mktemp("caches")
    write_token_cache(folder / "whole", Source(), encode, META, batch_size=1, workers=1)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("alitok_fast.data.cache_writer._BATCHES_PER_BLOCK", 1)
    calls = []

    def killed(images: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return encode(images)

    with pytest.raises(RuntimeError, match="killed"):
        write_token_cache(folder / "begun", Source(), killed, META, batch_size=1, workers=1)
    monkeypatch.undo()
    return folder


def check_cache(folder: Path, steps, expected: np.ndarray) -> None:
    apply(folder, steps)
    try:
        cache = validate_token_cache(folder)
    except ValueError as error:
        names_it(error, folder)
        return
    assert cache.tokens.shape == (cache.meta.num_images, cache.meta.num_crops, cache.meta.num_tokens)
    assert 0 <= int(cache.tokens.min()) and int(cache.tokens.max()) < cache.meta.codebook_size
    assert cache.meta.image_size > 0 and cache.fingerprint() and cache.summary


def check_begun(folder: Path, steps, expected: np.ndarray) -> None:
    """Whatever a killed writer, or its disk, left: refused, or finished with the right tokens."""
    apply(folder, steps)
    try:
        write_token_cache(folder, Source(), encode, META, batch_size=2, workers=1)
        found = validate_token_cache(folder)
    except ValueError as error:
        names_it(error, folder)
        return
    assert (found.tokens == expected).all()


CACHE_DAMAGE = damage(("meta.json", "tokens.npy", "labels.npy"))
BEGUN_DAMAGE = damage(("progress.json", "tokens.partial.npy"))
CASES = pytest.mark.parametrize("state", ["whole", "begun"])


def run_cache(caches: Path, state: str, data: st.DataObject) -> None:
    strategy, judge = {"whole": (CACHE_DAMAGE, check_cache), "begun": (BEGUN_DAMAGE, check_begun)}[state]
    expected = validate_token_cache(caches / "whole").tokens.copy()
    judge(copy(caches / state, caches / "damaged"), data.draw(strategy), expected)


@CASES
@settings(max_examples=150, **COMMON)
@given(data=st.data())
def test_damaged_caches(caches: Path, state: str, data: st.DataObject) -> None:
    run_cache(caches, state, data)


@pytest.mark.slow
@CASES
@settings(max_examples=1500, **COMMON)
@given(data=st.data())
def test_much_damaged_caches(caches: Path, state: str, data: st.DataObject) -> None:
    run_cache(caches, state, data)


# ---- parquet files ----


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("exported")
    write_token_cache(folder / "cache", Source(), encode, META, batch_size=1, workers=1)
    export_parquet(validate_token_cache(folder / "cache"), folder / "parquet", rows_per_file=3)
    return folder


PARQUET_DAMAGE = damage(("tokens-00000-of-00002.parquet", "tokens-00001-of-00002.parquet"))


def check_parquet(exported: Path, steps) -> None:
    """Pages have checksums, so that no token is another one unnoticed."""
    folder, out = copy(exported / "parquet", exported / "damaged"), exported / "out"
    apply(folder, steps)
    shutil.rmtree(out, ignore_errors=True)
    try:
        found = import_parquet([folder], out, facts=TokenFacts(codebook_size=50, image_size=4))
    except ValueError as error:
        names_it(error, folder)
        return
    assert (found.tokens == validate_token_cache(exported / "cache").tokens).all()


@settings(max_examples=150, **COMMON)
@given(PARQUET_DAMAGE)
def test_damaged_parquet(exported: Path, steps) -> None:
    check_parquet(exported, steps)


@pytest.mark.slow
@settings(max_examples=1500, **COMMON)
@given(PARQUET_DAMAGE)
def test_much_damaged_parquet(exported: Path, steps) -> None:
    check_parquet(exported, steps)


# ---- run folders ----


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    run = RunFolder(folder, "generator", SETTINGS, {"width": 8}, resume=False, inputs={"data": {"fingerprint": "a"}})
    state = {key: torch.zeros(2) for key in ("model", "optimizer", "ema", "meter", "rng", "cuda_rng")}
    run.save_state({**state, "step": 4})
    for step in (2, 4, 6):
        run.log({"step": step, "loss": 1.0})
    return folder


RUN_DAMAGE = damage(("config.json", "log.jsonl", "checkpoint/state.pt"))


def check_run(folder: Path, steps) -> None:
    apply(folder, steps)
    try:
        read_settings(folder)
        inputs = {"data": {"fingerprint": "a"}}
        run = RunFolder(folder, "generator", SETTINGS, {"width": 8}, resume=True, inputs=inputs)
        state = run.load_state()
    except ValueError as error:
        names_it(error, folder)
        return
    assert state is None or 0 <= state["step"] <= SETTINGS.steps
    log = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    assert all(entry["step"] <= (0 if state is None else state["step"]) for entry in log)


@settings(max_examples=200, **COMMON)
@given(RUN_DAMAGE)
def test_damaged_runs(run_folder: Path, steps) -> None:
    check_run(copy(run_folder, run_folder.with_name("damaged")), steps)


@pytest.mark.slow
@settings(max_examples=3000, **COMMON)
@given(RUN_DAMAGE)
def test_much_damaged_runs(run_folder: Path, steps) -> None:
    check_run(copy(run_folder, run_folder.with_name("damaged")), steps)
