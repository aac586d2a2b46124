"""Both stages, the token cache and the generator, end to end on tiny data; failures on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training.conftest import FIRST, GENERATOR, GENERATOR_TRAINING, TOKENIZER, TOKENIZER_TRAINING, batch_of

from alitok_fast.data import open_source, to_tensor
from alitok_fast.data.loader import to_floats
from alitok_fast.models.loading import load_generator, load_tokenizer
from alitok_fast.training import loop
from alitok_fast.training.generator import GeneratorTask, train_generator
from alitok_fast.training.run_folder import _STATE_KEYS, RunFolder
from alitok_fast.training.tokenize import tokenize
from alitok_fast.training.tokenizer import TokenizerTask, train_tokenizer


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint" / "state.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def runs(idx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1, tokens, stage 2 and generator, trained one after the other."""
    folder = tmp_path_factory.mktemp("runs")
    source = open_source(idx_folder, image_size=8)
    longer = dict(steps=200, batch_size=8, lr=5e-3, save_every=200)
    stage1 = train_tokenizer(
        source, folder / "stage1", 1, TOKENIZER, replace(TOKENIZER_TRAINING, **longer), progress=False
    )
    cache = tokenize(load_tokenizer(stage1), source, folder / "tokens", crops=2, progress=False)
    train_tokenizer(
        source, folder / "stage2", 2, TOKENIZER, replace(TOKENIZER_TRAINING, **longer), stage1, progress=False
    )
    config = replace(GENERATOR_TRAINING, **{**longer, "steps": 150})
    train_generator(cache, folder / "generator", replace(GENERATOR, dropout=0.0), config, progress=False)
    return folder


@pytest.mark.parametrize("name", ["stage1", "stage2", "generator"])
def test_loss_falls(runs: Path, name: str) -> None:
    key = "loss" if name == "generator" else "mse"
    log = log_of(runs / name)
    assert np.mean([e[key] for e in log[-3:]]) < 0.7 * log[0][key]
    assert all(np.isfinite(list(entry.values())).all() for entry in log)


def test_stage2_keeps_what_stage1_learned(runs: Path) -> None:
    first, second = load_tokenizer(runs / "stage1" / "model"), load_tokenizer(runs / "stage2" / "model")
    assert (first.config.stage, second.config.stage) == (1, 2)
    kept = [n for n in second.state_dict() if n.startswith(("encoder.", "latent_tokens", "quantize.embedding"))]
    assert len(kept) > 10
    for name in kept:
        assert torch.equal(first.state_dict()[name], second.state_dict()[name]), name
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(first.encode(images), second.encode(images))


def test_model_folder_tells_where_it_comes_from(runs: Path) -> None:
    for name in ("stage1", "stage2", "generator"):
        provenance = json.loads((runs / name / "model" / "config.json").read_text())["provenance"]
        assert provenance["training"]["batch_size"] == 8 and provenance["step"] == provenance["training"]["steps"]
    assert load_generator(runs / "generator" / "model").config.class_dropout == GENERATOR.class_dropout


def test_codebook_is_used(runs: Path) -> None:
    last = log_of(runs / "stage1")[-1]
    assert 0 < last["usage"] <= 1 and 1 < last["perplexity"] <= 16


def test_stage1_loss_is_the_stated_sum(idx_folder: Path) -> None:
    from alitok_fast.models.tokenizer import Tokenizer

    torch.manual_seed(0)
    model = Tokenizer(TOKENIZER)
    task = TokenizerTask(model, open_source(idx_folder, image_size=8), TOKENIZER_TRAINING)
    (pixels,) = batch_of(task, 0)
    images = to_floats(pixels)
    output = model(images)
    strip = torch.cat([images[:, :, :4, :4], images[:, :, :4, :]], 3)
    expected = (
        (images - output.reconstruction).square().mean()
        + 10 * (3 / 4) * (strip - output.aux).square().mean()  # 3 prefix tokens stand beside 4 image tokens
        + output.vq.loss
    )
    torch.testing.assert_close(task.loss(FIRST, pixels).loss, expected)


def test_batches_depend_on_the_index_alone(idx_folder: Path) -> None:
    from alitok_fast.models.tokenizer import Tokenizer

    source = open_source(idx_folder, image_size=8)
    one, two = (TokenizerTask(Tokenizer(TOKENIZER), source, TOKENIZER_TRAINING) for _ in range(2))
    for index in range(9):
        batch_of(one, index)
    assert torch.equal(batch_of(one, 9)[0], batch_of(two, 9)[0])
    assert not torch.equal(batch_of(one, 9)[0], batch_of(two, 10)[0])


def test_accumulation_equals_one_large_batch(runs: Path, tmp_path: Path) -> None:
    """The generator's loss is a mean over equal parts, so two halves give the gradient of the whole."""
    from alitok_fast.data import validate_token_cache

    cache = validate_token_cache(runs / "tokens")
    model = replace(GENERATOR, dropout=0.0, class_dropout=0.0)
    for parts in (1, 2):
        config = replace(GENERATOR_TRAINING, grad_accumulation=parts)
        train_generator(cache, tmp_path / str(parts), model, config, progress=False)
    one, two = state_of(tmp_path / "1"), state_of(tmp_path / "2")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_moving_average(runs: Path, tmp_path: Path) -> None:
    from alitok_fast.data import validate_token_cache

    cache = validate_token_cache(runs / "tokens")
    config = replace(GENERATOR_TRAINING, steps=1, warmup=0, ema_decay=0.75)
    train_generator(cache, tmp_path, GENERATOR, config, progress=False)
    torch.manual_seed(config.seed)
    from alitok_fast.models.generator import Generator

    start, trained = Generator(GENERATOR).state_dict(), state_of(tmp_path)
    averaged = load_generator(tmp_path / "model").state_dict()
    assert not torch.equal(trained["output.weight"], start["output.weight"])
    for name, value in averaged.items():
        torch.testing.assert_close(value, 0.1 * start[name] + 0.9 * trained[name])  # the first step of its warm-up


def test_moving_average_begins_with_a_lower_decay() -> None:
    from alitok_fast.training.state import MovingAverage

    weight = torch.nn.Linear(1, 1, bias=False)
    average, expected = MovingAverage(weight, 0.5), weight.weight.detach().clone()
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5)):
        torch.nn.init.constant_(weight.weight, step)
        average.update(weight, step)
        expected = decay * expected + (1 - decay) * step
        torch.testing.assert_close(average.weights()["weight"], expected)


def test_bf16_trains(idx_folder: Path, tmp_path: Path) -> None:
    config = replace(TOKENIZER_TRAINING, precision="bf16", steps=4)
    train_tokenizer(open_source(idx_folder, image_size=8), tmp_path, 1, TOKENIZER, config, progress=False)
    assert {value.dtype for value in state_of(tmp_path).values()} == {torch.float32}


def test_nan_stops_and_keeps_the_last_checkpoint(runs: Path, tmp_path: Path) -> None:
    from alitok_fast.data import validate_token_cache
    from alitok_fast.models.generator import Generator

    class Poisoned(GeneratorTask):
        def loss(self, place, tokens, labels):
            output = super().loss(place, tokens, labels)
            self.calls = getattr(self, "calls", 0) + 1
            return output._replace(loss=output.loss * float("nan")) if self.calls == 8 else output

    config = GENERATOR_TRAINING
    run = RunFolder(tmp_path, "generator", config, GENERATOR.to_dict(), resume=False)
    task = Poisoned(Generator(GENERATOR), validate_token_cache(runs / "tokens"), config)
    with pytest.raises(
        FloatingPointError, match="a finite number, got nan .* at step 7 of phase 1; the last checkpoint is"
    ):
        loop.train(task, config, run, progress=False)
    state = torch.load(run.state_file, weights_only=True)
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["model"].values())


def test_run_folder_refuses_to_mix_runs(runs: Path, idx_folder: Path) -> None:
    source = open_source(idx_folder, image_size=8)
    with pytest.raises(ValueError, match="already holds a run"):
        train_tokenizer(source, runs / "stage1", 1, TOKENIZER, TOKENIZER_TRAINING, progress=False)
    with pytest.raises(ValueError, match="config.json, got train.batch_size: expected 8, got 4"):
        train_tokenizer(source, runs / "stage1", 1, TOKENIZER, TOKENIZER_TRAINING, resume=True, progress=False)


def test_damaged_checkpoint_is_refused(runs: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "x", GENERATOR_TRAINING, {}, resume=False)
    run.state_file.write_bytes((runs / "generator" / "checkpoint" / "state.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="state.pt: expected a whole checkpoint"):
        run.load_state()


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path, "x", GENERATOR_TRAINING, {}, resume=False)
    rest = {key: {} for key in _STATE_KEYS - {"step"}}
    run.save_state({"step": 1, **rest})

    def full(value, file) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run.save_state({"step": 2, **rest})
    assert run.load_state() == {"step": 1, **rest}
    assert [p.name for p in run.state_file.parent.iterdir()] == ["state.pt"]


def test_arguments_are_checked(idx_folder: Path, runs: Path, tmp_path: Path) -> None:
    from alitok_fast.data import validate_token_cache

    source, cache = open_source(idx_folder, image_size=8), validate_token_cache(runs / "tokens")
    with pytest.raises(ValueError, match="stage: expected 1 or 2, got 3"):
        train_tokenizer(source, tmp_path, 3, TOKENIZER, TOKENIZER_TRAINING)
    with pytest.raises(ValueError, match="stage1: expected a stage-1 checkpoint for stage 2, got None"):
        train_tokenizer(source, tmp_path, 2, TOKENIZER, TOKENIZER_TRAINING)
    with pytest.raises(ValueError, match="cache: expected tokens 13 .*, got 7"):
        train_generator(cache, tmp_path, replace(GENERATOR, grid=3), GENERATOR_TRAINING)
    with pytest.raises(ValueError, match="cache: expected at most 2 classes, got 3"):
        train_generator(cache, tmp_path, replace(GENERATOR, num_classes=2), GENERATOR_TRAINING)


def test_tensorboard_absent_is_a_clear_error(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from alitok_fast.data import validate_token_cache

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match=r"pip install .*\[train\]'"):
        cache = validate_token_cache(runs / "tokens")
        train_generator(cache, tmp_path, GENERATOR, GENERATOR_TRAINING, tensorboard=True, progress=False)


def test_tensorboard_gets_the_log(idx_folder: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    source, config = open_source(idx_folder, image_size=8), replace(TOKENIZER_TRAINING, steps=4)
    train_tokenizer(source, tmp_path, 1, TOKENIZER, config, tensorboard=True, progress=False)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key in ("loss", "usage", "perplexity"):
        assert [e.step for e in events.Scalars(key)] == [2, 4]
        assert [e.value for e in events.Scalars(key)] == pytest.approx([e[key] for e in log_of(tmp_path)])


def test_token_cache_holds_the_tokenizers_tokens(runs: Path, idx_folder: Path) -> None:
    from alitok_fast.data import cache_crops, validate_token_cache

    source, cache = open_source(idx_folder, image_size=8), validate_token_cache(runs / "tokens")
    tokenizer = load_tokenizer(runs / "stage1" / "model")
    images = to_tensor(cache_crops(source.image(5), 8, 2))
    assert (tokenizer.encode(images).numpy() == cache.tokens[5]).all()
