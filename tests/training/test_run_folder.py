"""A run's folder: compared before it goes on, never another's files, whole after any kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training.conftest import GENERATOR, GENERATOR_TRAINING, TOKENIZER, TOKENIZER_TRAINING

from alitok_fast.data import open_source, validate_token_cache, write_token_cache
from alitok_fast.data.token_cache import TokenCache, TokenCacheMeta
from alitok_fast.models.loading import save_model
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.storage.files import locked
from alitok_fast.training import loop
from alitok_fast.training.generator import train_generator
from alitok_fast.training.meter import CodebookWatch
from alitok_fast.training.run_folder import LOCK_NAME
from alitok_fast.training.tokenizer import train_tokenizer

TESTS = Path(__file__).resolve().parents[1]
SHORT = replace(GENERATOR_TRAINING, steps=4, save_every=2)


class Source:
    name, class_names, labels = "noise", ["a", "b", "c"], np.arange(6) % 3

    def __len__(self) -> int:
        return 6

    def image(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    folder = tmp_path_factory.mktemp("cache")
    meta = TokenCacheMeta(6, 1, 7, 16, 8, ["a", "b", "c"], "noise", "abc")

    def encode(images: torch.Tensor) -> torch.Tensor:
        return ((images * 255).round().long().sum((1, 2, 3))[:, None] * torch.arange(1, 8)) % 16

    write_token_cache(folder, Source(), encode, meta)
    return validate_token_cache(folder)


def train(cache: TokenCache, out: Path, config=SHORT, **options) -> Path:
    return train_generator(cache, out, GENERATOR, config, progress=False, **options)


def step_of(out: Path) -> int:
    return json.loads((out / "model" / "config.json").read_text())["provenance"]["step"]


def weights_of(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "model/config.json", "checkpoint/state.pt"])
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_others_are_kept_unless_forced(cache, tmp_path: Path, name: str, resume: bool) -> None:
    mine, text = tmp_path / "out" / name, '{"mine": 1}'
    mine.parent.mkdir(parents=True)
    mine.write_text(text)
    with pytest.raises(ValueError, match=f"out: .*{name}.*--force"):
        train(cache, tmp_path / "out", resume=resume)
    assert mine.read_text() == text
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]
    if not resume:
        train(cache, tmp_path / "out", force=True)
        assert step_of(tmp_path / "out") == 4


def test_links_are_replaced_not_followed(cache, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    out = tmp_path / "out"
    train(cache, out, replace(SHORT, steps=2))
    (out / "log.jsonl").unlink()
    (out / "log.jsonl").symlink_to(mine)
    train(cache, out, resume=True)
    assert mine.read_text() == "precious" and not (out / "log.jsonl").is_symlink()


def test_a_refused_run_leaves_no_folder(cache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 2 classes"):
        train_generator(cache, tmp_path / "a" / "b", replace(GENERATOR, num_classes=2), SHORT)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="out: expected a folder, got the file"):
        train(cache, tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_a_second_process_is_refused(cache, tmp_path: Path) -> None:
    train(cache, tmp_path, replace(SHORT, steps=2))
    with locked(tmp_path / LOCK_NAME), pytest.raises(ValueError, match="which another process is writing"):
        train(cache, tmp_path, resume=True)
    train(cache, tmp_path, resume=True)
    assert not (tmp_path / LOCK_NAME).exists()


def test_other_tokens_are_not_gone_on_with(cache, tmp_path: Path) -> None:
    train(cache, tmp_path, replace(SHORT, steps=2))
    other = replace(cache, tokens=(np.asarray(cache.tokens) + 1) % 16)
    with pytest.raises(ValueError, match="config.json, got inputs.data.fingerprint: expected '"):
        train(other, tmp_path, resume=True)
    renamed = replace(cache, meta=replace(cache.meta, source="noise"))
    train(renamed, tmp_path, resume=True)


def test_other_pictures_and_first_weights_are_not_gone_on_with(tmp_path: Path, idx_folder: Path) -> None:
    source, config = open_source(idx_folder, image_size=8), replace(TOKENIZER_TRAINING, steps=2)
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_model(tmp_path / f"first{seed}", Tokenizer(TOKENIZER))

    def stage2(out: str, data, first: str | None, **options) -> Path:
        stage1 = None if first is None else tmp_path / first
        return train_tokenizer(data, tmp_path / out, 2, TOKENIZER, config, stage1, progress=False, **options)

    stage2("run", source, "first0")
    with pytest.raises(ValueError, match="got inputs.stage1: expected '.*', got '"):
        stage2("run", source, "first1", resume=True)
    with pytest.raises(ValueError, match="got inputs.data.images: expected 24, got 6"):
        stage2("run", Source(), "first0", resume=True)
    stage2("run", source, "first0", resume=True)
    stage2("run", source, None, resume=True)  # the checkpoint has all weights
    with pytest.raises(ValueError, match="stage1: expected a stage-1 checkpoint"):
        stage2("new", source, None, resume=True)


def test_a_run_is_extended_and_not_shortened(cache, tmp_path: Path) -> None:
    train(cache, tmp_path)
    train(cache, tmp_path, replace(SHORT, steps=6), resume=True)
    assert step_of(tmp_path) == 6 and json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 6
    with pytest.raises(ValueError, match=r"steps: expected at least 6, the steps of .*state.pt, got 5"):
        train(cache, tmp_path, replace(SHORT, steps=5), resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 6


def test_killed_between_a_checkpoint_and_its_model(cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop._Trainer._save_model
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_save_model", lambda *a: 1 / 0 if a[-1] == 4 else real(*a))
        with pytest.raises(ZeroDivisionError):
            train(cache, tmp_path / "a")
    assert step_of(tmp_path / "a") == 2
    train(cache, tmp_path / "a", resume=True)
    train(cache, tmp_path / "b")
    assert step_of(tmp_path / "a") == 4 and weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def test_leftovers_of_killed_writers_go(cache, tmp_path: Path) -> None:
    train(cache, tmp_path, replace(SHORT, steps=2))
    for name in (".config.json.alitok-tmp", "checkpoint/.state.pt.alitok-tmp", "model/.model.safetensors.alitok-tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "model" / ".tmpAb3dEf").write_text("safetensors' own")
    (tmp_path / "model" / ".mine").write_text("kept")
    train(cache, tmp_path, resume=True)
    assert [path.name for path in tmp_path.rglob(".*")] == [".mine"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"a": torch.zeros(1)}, "expected a run's checkpoint"),
        (lambda s: [1], "expected a run's checkpoint"),
        (lambda s: {key: value for key, value in s.items() if key != "rng"}, "expected a run's checkpoint"),
        (lambda s: {**s, "model": {}}, "expected a checkpoint of this run, got another"),
        (lambda s: {**s, "rng": torch.zeros(3)}, "expected a checkpoint of this run, got another"),
        (lambda s: {**s, "meter": 5}, "expected a checkpoint of this run, got another"),
        (lambda s: {**s, "step": "4"}, "expected a run's checkpoint"),
    ],
)
def test_damaged_checkpoints_name_the_file(cache, tmp_path: Path, change, message: str) -> None:
    train(cache, tmp_path, replace(SHORT, steps=2))
    state = tmp_path / "checkpoint" / "state.pt"
    torch.save(change(torch.load(state, weights_only=True)), state)
    with pytest.raises(ValueError, match=f"state.pt: {message}") as error:
        train(cache, tmp_path, resume=True)
    assert len(str(error.value).splitlines()) == 1


def test_weights_that_are_no_numbers_are_never_saved(cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.MovingAverage.update

    def poison(average, model, step) -> None:
        real(average, model, step)
        poison.calls += 1
        if poison.calls == 4:
            with torch.no_grad():
                model.output.weight[0, 0] = float("inf")

    poison.calls = 0
    monkeypatch.setattr(loop.MovingAverage, "update", poison)
    with pytest.raises(
        FloatingPointError, match="weight .*: expected a finite number, got inf at step 3 of phase 1; the last"
    ):
        train(cache, tmp_path, replace(SHORT, ema_decay=0.5))
    assert step_of(tmp_path) == 2
    assert torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)["step"] == 2


_INTERRUPTED = """
import sys, time, torch
torch.set_num_threads(1)
from training.conftest import GENERATOR, GENERATOR_TRAINING
from dataclasses import replace
from alitok_fast.data import validate_token_cache
from alitok_fast.training.generator import GeneratorTask, train_generator
def slowly(self, outputs):
    print("step", flush=True)
    time.sleep(0.2)
GeneratorTask.after_backward = slowly
config = replace(GENERATOR_TRAINING, steps=1000, save_every=1000)
train_generator(validate_token_cache(sys.argv[1]), sys.argv[2], GENERATOR, config, progress=False)
"""


def test_ctrl_c_finishes_the_step_and_saves_it(cache, tmp_path: Path) -> None:
    paths = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n"
    folder = Path(cache.tokens.filename).parent
    command = [sys.executable, "-c", paths + _INTERRUPTED, str(folder), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors and "saved first" in errors
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == step_of(tmp_path / "run") >= 3
    assert all(value.isfinite().all() for value in state["model"].values())


def test_training_in_another_thread_leaves_signals_alone(cache, tmp_path: Path) -> None:
    before, found = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: found.append(train(cache, tmp_path)))
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGINT) is before
        time.sleep(0.01)
    assert found == [tmp_path / "model"] and signal.getsignal(signal.SIGINT) is before


def test_a_collapsed_codebook_is_said_once_in_words(caplog: pytest.LogCaptureFixture) -> None:
    watch = CodebookWatch(warmup=10)
    for step, perplexity in ((5, 2.0), (15, 300.0), (20, 9.7), (25, 9.0)):
        watch.see(step, {"perplexity": perplexity}, 512)
    watch.see(30, {}, 0)
    (record,) = caplog.records
    assert "codebook: collapsed at step 20: its perplexity is 9.7" in record.getMessage()
    assert "of its 512 codes" in record.getMessage()
