"""The alignment study from pictures to a table, with trainings of two steps."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alitok_fast.cli import main
from alitok_fast.data import open_source, validate_token_cache
from alitok_fast.evaluation.classifier import features
from alitok_fast.evaluation.judge import evaluate_tokenizer
from alitok_fast.models.loading import load_generator, load_tokenizer
from alitok_fast.storage.files import locked
from alitok_fast.studies.alignment import AlignmentStudy, Splits, held_out
from alitok_fast.studies.budget import Budget
from alitok_fast.studies.rows import ROWS, Row, own_row

STEPS = ("steps=2", "warmup=1", "batch_size=4", "pictures_every=0", "log_every=1", "precision=fp32")
SMALL = ("model.encoder_layers=1", "model.decoder_layers=1", "model.codebook_size=64")
BUDGET = Budget(tokenizer=(*STEPS, *SMALL), generator=(*STEPS, "model.num_layers=1"), samples=2, judge_epochs=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for number in range(count):
            file = folder / split / f"class{number % 2}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    return folder


@pytest.fixture
def splits(photos: Path) -> Splits:
    return Splits(*(open_source(photos, name, BUDGET.image_size) for name in ("train", "test")))


def study(splits: Splits, out: Path, budget: Budget = BUDGET) -> AlignmentStudy:
    return AlignmentStudy(splits, out, budget, workers=0, progress=False, say=lambda line: None)


class Mean:
    """A tokenizer of one's own: the mean grey of each quarter, in 16 steps."""

    codebook_size = 16

    def encode(self, images: Tensor) -> Tensor:
        return (torch.nn.functional.adaptive_avg_pool2d(images.mean(1), 2).flatten(1) * 16).long().clamp(max=15)

    def decode(self, tokens: Tensor) -> Tensor:
        return ((tokens.view(-1, 1, 2, 2) + 0.5) / 16).repeat(1, 3, 16, 16)


def test_rows_from_training_to_results(splits: Splits, tmp_path: Path):
    """A second stage has the first one's tokens and generator; every number is what its own function gives."""
    rows = [*ROWS, Row("mean", "mean grey", load=Mean)]
    study(splits, tmp_path / "out").run(rows, names=["bidirectional", "second-stage", "mean"])
    found = {result["row"]: result for result in study(splits, tmp_path / "out").results()}
    assert list(found) == ["auxiliary", "bidirectional", "mean", "second-stage"]
    assert [found[name]["tokens"] for name in found] == [73, 64, 4, 73]
    assert found["mean"]["codebook_size"] == 16
    assert found["second-stage"]["test"] == found["auxiliary"]["test"]
    assert found["second-stage"]["reconstruction"]["psnr"] != found["auxiliary"]["reconstruction"]["psnr"]

    seed = tmp_path / "out" / "seed-0"
    assert not (seed / "second-stage" / "generator").exists()
    second = load_tokenizer(seed / "second-stage" / "tokenizer" / "model")
    assert second.config.stage == 2
    images = torch.from_numpy(np.stack([splits.test.image(i) for i in range(6)]).transpose(0, 3, 1, 2).copy())
    assert evaluate_tokenizer(second, images)["psnr"] == found["second-stage"]["reconstruction"]["psnr"]
    first = load_generator(seed / "bidirectional" / "generator" / "model")
    cache = validate_token_cache(seed / "bidirectional" / "tokens" / "test")
    assert held_out(first, cache) == found["bidirectional"]["test"]
    assert found["bidirectional"]["generation"]["guided"]["samples"] == 4


def test_held_out_is_the_mean_over_all_tokens(splits: Splits, tmp_path: Path):
    study(splits, tmp_path / "out").run([Row("mean", "mean grey", load=Mean)])
    seed = tmp_path / "out" / "seed-0" / "mean"
    generator, cache = load_generator(seed / "generator" / "model"), validate_token_cache(seed / "tokens" / "test")
    tokens, labels = torch.from_numpy(cache.tokens[:, 0].astype(np.int64)), torch.from_numpy(np.array(cache.labels))
    with torch.no_grad():
        logits = generator(tokens, labels)[:, :4].double().log_softmax(-1)
    nats = -logits.gather(2, tokens[..., None]).mean()
    for size in (2, 4, 100):  # batches of other sizes, the last one smaller
        measured = held_out(generator, cache, size)
        assert measured["loss"] == pytest.approx(float(nats), rel=1e-5)
        assert measured["accuracy"] == pytest.approx(float((logits.argmax(-1) == tokens).double().mean()))
        assert measured["bits_per_image"] == pytest.approx(float(nats) * 4 / np.log(2), rel=1e-5)


def test_a_study_goes_on_and_keeps_what_it_has(splits: Splits, tmp_path: Path):
    out = tmp_path / "out"
    study(splits, out).run(ROWS, names=["causal-encoder"])
    file = out / "seed-0" / "causal-encoder" / "result.json"
    before, when = file.read_text(), file.stat().st_mtime_ns
    study(splits, out).run(ROWS, names=["causal-encoder"])
    assert file.stat().st_mtime_ns == when
    file.unlink()  # killed while measuring
    shutil.rmtree(file.parent / "generator")
    study(splits, out).run(ROWS, names=["causal-encoder"])
    assert file.read_text() == before
    study(splits, out).run(ROWS, 2, names=["causal-encoder"])
    assert [result["seed"] for result in study(splits, out).results()] == [0, 1]
    assert (out / "seed-1" / "causal-encoder" / "result.json").read_text() != before.replace('"seed": 0', '"seed": 1')


def test_other_settings_and_data_are_refused(splits: Splits, tmp_path: Path):
    study(splits, tmp_path / "out")
    with pytest.raises(ValueError, match=r"^out: expected the settings in .*study.json, got .*samples"):
        study(splits, tmp_path / "out", Budget(tokenizer=BUDGET.tokenizer, generator=BUDGET.generator, samples=3))
    with pytest.raises(ValueError, match=r"^out: expected the settings in .*study.json, got .*data"):
        study(Splits(splits.test, splits.train), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="^out: expected a new folder or a study's, got .* other things in it"):
        study(splits, tmp_path / "mine")
    with pytest.raises(ValueError, match="^samples: expected at least 1, got 0"):
        Budget(samples=0)
    with pytest.raises(ValueError, match="^tokenizer-set: expected settings of the model's sizes and .* got init="):
        Budget(tokenizer=("model.init=mine",))
    with pytest.raises(ValueError, match="^generator-set: expected settings .* got cache="):
        Budget(generator=("data.cache=mine",))
    with pytest.raises(ValueError, match="^seeds: expected at least 1, got 0"):
        study(splits, tmp_path / "out").run(ROWS, 0)


def test_a_judge_that_another_process_trains_is_waited_for(splits: Splits, tmp_path: Path):
    first = study(splits, tmp_path / "out")
    held = threading.Event()

    def hold() -> None:
        with locked(tmp_path / "out" / ".judge.lock"):
            held.set()
            time.sleep(0.5)

    with ThreadPoolExecutor(1) as other:
        holding = other.submit(hold)
        held.wait()
        judge, facts = first.judge()
        assert holding.done()
    again, same = first.judge()
    assert facts == same and 0 <= facts["test_accuracy"] <= 1
    images = torch.from_numpy(np.stack([splits.test.image(i) for i in range(6)]).transpose(0, 3, 1, 2).copy())
    assert torch.equal(features(judge, images), features(again, images))


def test_the_command(photos: Path, tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arguments = ["--data", photos, "--out", out, "--row", "mean", "--tokenizer", f"mean={__name__}:Mean"]
    for setting in STEPS:
        arguments += ["--generator-set", setting]
    arguments += ["--samples", 2, "--judge-epochs", 1, "--workers", 0, "--no-progress"]
    monkeypatch.setattr(sys, "argv", ["alitok-fast", "study", "alignment", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    printed, complaints = capsys.readouterr()
    assert exit_.value.code in (None, 0), complaints
    assert f"wrote {out / 'table.md'}" in printed
    assert "| tokens | 4 |" in (out / "table.md").read_text()
    assert [result["row"] for result in json.loads((out / "results.json").read_text())["results"]] == ["mean"]


def test_the_row_of_a_model_folder_is_not_trained(splits: Splits, tmp_path: Path):
    study(splits, tmp_path / "out").run([own_row("shipped=demo")])
    (found,) = study(splits, tmp_path / "out").results()
    assert (found["row"], found["tokens"], found["codebook_size"]) == ("shipped", 73, 1024)
    assert not (tmp_path / "out" / "seed-0" / "shipped" / "tokenizer").exists()
