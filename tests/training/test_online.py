"""Evaluation while training: the numbers of `alitok-fast evaluate`, in the log and in TensorBoard, and no other run."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alitok_fast.cli import main
from alitok_fast.config import GeneratorConfig, TokenizerConfig
from alitok_fast.data import open_source, validate_token_cache
from alitok_fast.models.loading import load_tokenizer
from alitok_fast.training import online
from alitok_fast.training.config import GeneratorTrainConfig, TokenizerTrainConfig
from alitok_fast.training.generator import train_generator
from alitok_fast.training.interrupts import Interrupts
from alitok_fast.training.loop import _Trainer
from alitok_fast.training.run_folder import EVALUATED
from alitok_fast.training.tokenize import tokenize
from alitok_fast.training.tokenizer import train_tokenizer

HUB = """
import torch
dependencies = ["torch"]


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(3, generator=torch.Generator().manual_seed(0)) + torch.rand(3) * 0)

    def forward(self, images):
        return images.mean((2, 3)) * self.scale


def mean(pretrained=True):
    return Mean()
"""
TOKENIZER = TokenizerConfig(
    image_size=16, patch_size=4, codebook_size=32, code_dim=8, encoder_width=16, encoder_layers=1, encoder_heads=2,
    decoder_width=16, decoder_layers=1, decoder_heads=2, stage=1,
)  # fmt: skip
GENERATOR = GeneratorConfig(
    width=16, num_layers=2, num_heads=2, grid=4, codebook_size=32, num_classes=3, hidden_multiple=8, guidance_scale=3.0
)
SHORT: dict[str, Any] = dict(
    steps=6, batch_size=4, lr=1e-2, warmup=2, precision="fp32", log_every=3, save_every=2, pictures_every=0
)
ONLINE: dict[str, Any] = dict(evaluate_every=2, evaluate_images=36)
TIMES = ("samples_per_second", "waited", EVALUATED)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits in three classes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, photo in enumerate(np.random.default_rng(0).integers(0, 256, (60, 5, 5, 3), np.uint8)):
        place = folder / ("train" if number < 24 else "val") / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(photo // (1 + number % 3)).resize((24, 20), Image.Resampling.BICUBIC)
        picture.save(place / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "hubconf.py").write_text(HUB)
    return f"hub:{folder}:mean"


def alitok(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["alitok-fast", *map(str, arguments)])
        main()
    assert not exit_.value.code


@pytest.fixture(scope="module")
def tokenizer(photos: Path, network: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with evaluation."""
    return train_tokens(photos, tmp_path_factory.mktemp("tokenizer") / "run", evaluate_network=network, **ONLINE)


def train_tokens(photos: Path, out: Path, resume: bool = False, **settings: Any) -> Path:
    options = {key: settings.pop(key) for key in ("evaluate_network", "tensorboard") if key in settings}
    config = TokenizerTrainConfig(**{**SHORT, **settings})
    source = open_source(photos, "train", 16)
    held_out = open_source(photos, "val", 16, "stop", False, False, draft=False)
    options |= dict(held_out=held_out, resume=resume, progress=False, workers=0)
    train_tokenizer(source, out, 1, TOKENIZER, config, **options)
    return out


@pytest.fixture(scope="module")
def cache(photos: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "cache"
    tokenize(load_tokenizer(tokenizer / "model"), open_source(photos, image_size=16), folder, 1, progress=False)
    return folder


@pytest.fixture(scope="module")
def reference(photos: Path, network: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "train.safetensors"
    alitok("evaluate", "reference", "--data", photos, "--size", 16, "--network", network, "--out", out)
    return out


@pytest.fixture
def train(cache: Path, tokenizer: Path, reference: Path, tmp_path: Path) -> Callable[..., Path]:
    """train(name, **settings) -> the folder of a generator's run with evaluation."""

    def call(name: str = "run", resume: bool = False, options: dict[str, Any] | None = None, **settings: Any) -> Path:
        config = GeneratorTrainConfig(**{**SHORT, **ONLINE, **settings})
        given: dict[str, Any] = dict(reference=reference, tokenizer=tokenizer / "model", resume=resume, progress=False)
        tokens = validate_token_cache(cache)
        train_generator(tokens, tmp_path / name, GENERATOR, config, **{**given, **(options or {})})
        return tmp_path / name

    return call


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    """Figures by step, without the times."""
    found = [entry for entry in log_of(run) if EVALUATED in entry]
    assert all(entry[EVALUATED] > 0 for entry in found)
    steps = [entry["step"] for entry in found]
    assert len(set(steps)) == len(steps), steps
    return {e["step"]: {k.removeprefix("eval/"): v for k, v in e.items() if k not in ("step", *TIMES)} for e in found}


def state_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoint" / "state.pt", weights_only=True)


def same_training(one: Path, other: Path) -> None:
    first, second = state_of(one), state_of(other)
    assert all(torch.equal(second["model"][name], value) for name, value in first["model"].items())
    assert torch.equal(first["rng"][0]["cpu"], second["rng"][0]["cpu"])
    logs = [[{k: v for k, v in e.items() if k not in TIMES} for e in log_of(run) if "loss" in e] for run in (one, other)]
    assert logs[0] == logs[1] and len(logs[0]) == 2


# --- the same numbers as the commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_samples_are_those_of_the_command(train, tokenizer, reference, network, tmp_path: Path, ema: float) -> None:
    found = evaluations(train(ema_decay=ema))
    assert list(found) == [2, 4, 6] and found[2] != found[4] != found[6]
    model = ["--model", tmp_path / "run" / "model", "--tokenizer", tokenizer / "model", "--num-images", 36]
    measuring = ["--network", network, "--reference", reference, "--out", tmp_path / "result.json"]
    alitok("evaluate", "samples", *model, *measuring, "--no-progress")
    result = json.loads((tmp_path / "result.json").read_text())["measures"][network]
    expected = {name: value["mean"] for name, value in result.items()}
    expected |= {f"{name}_std": value["std_of_parts"] for name, value in result.items() if "std_of_parts" in value}
    assert found[6] == expected and {"frechet_distance", "kernel_distance_std", "recall"} <= expected.keys()


def test_reconstructions_are_those_of_the_command(tokenizer: Path, photos: Path, network: str, tmp_path: Path) -> None:
    found = evaluations(tokenizer)
    assert list(found) == [2, 4, 6] and found[2] != found[6]
    what = ["--data", photos, "--tokenizer", tokenizer / "model", "--lpips", "none", "--network", network]
    alitok("evaluate", "reconstruction", *what, "--out", tmp_path / "result.json", "--no-progress")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["images"] == 36
    figures = ("psnr", "psnr_error", "psnr_of_mean_error", "exact_images", "ssim", "ssim_error")
    figures += ("codebook_usage", "codebook_perplexity")
    assert found[6] == {**{name: result[name] for name in figures}, **result["distances"][network]}
