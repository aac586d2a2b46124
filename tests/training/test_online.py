"""Evaluation while training: the numbers of `alitok-fast evaluate`, in the log and in TensorBoard, and no other run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from alitok_fast.cli import main
from alitok_fast.cli.evaluate_reconstruction import reconstruction
from alitok_fast.config import GeneratorConfig, TokenizerConfig
from alitok_fast.data import DataOrder, open_source, validate_token_cache
from alitok_fast.data.loader import Loader
from alitok_fast.evaluation.networks import load_network
from alitok_fast.evaluation.reference import Reference, read_reference, write_reference
from alitok_fast.inference.params import SamplingParams
from alitok_fast.models.discriminator import Discriminator
from alitok_fast.models.generator import Generator
from alitok_fast.models.loading import load_tokenizer
from alitok_fast.training import online
from alitok_fast.training.config import GeneratorTrainConfig, TokenizerTrainConfig
from alitok_fast.training.generator import train_generator
from alitok_fast.training.interrupts import Interrupts
from alitok_fast.training.loop import _Trainer
from alitok_fast.training.meter import Meter
from alitok_fast.training.phases import Phase
from alitok_fast.training.ranks import Ranks
from alitok_fast.training.run_folder import EVALUATED
from alitok_fast.training.tokenize import tokenize
from alitok_fast.training.tokenizer import train_tokenizer

HUB = """
import torch
dependencies = ["torch"]


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.rand(3)  # whoever loads it draws random numbers
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

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
    given = ("evaluate_network", "evaluate_weights", "held_out", "tensorboard")
    options = {key: settings.pop(key) for key in given if key in settings}
    config = TokenizerTrainConfig(**{**SHORT, **settings})
    source = open_source(photos, "train", 16)
    held_out = open_source(photos, "val", 16, "stop", False, False, draft=False)
    options = dict(held_out=held_out) | options | dict(resume=resume, progress=False, workers=0)
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


def same_weights(one: Path, other: Path) -> None:
    first, second = state_of(one), state_of(other)
    assert all(torch.equal(second["model"][name], value) for name, value in first["model"].items())


def same_training(one: Path, other: Path) -> None:
    same_weights(one, other)
    first, second = state_of(one), state_of(other)
    assert torch.equal(first["rng"][0]["cpu"], second["rng"][0]["cpu"])
    logs = [
        [{k: v for k, v in e.items() if k not in TIMES} for e in log_of(run) if "loss" in e] for run in (one, other)
    ]
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
    command = typer.Typer()
    command.command()(reconstruction)
    done = CliRunner().invoke(command, [*map(str, what), "--out", str(tmp_path / "result.json"), "--no-progress"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["images"] == 36
    figures = ("psnr", "psnr_error", "psnr_of_mean_error", "exact_images", "ssim", "ssim_error")
    figures += ("codebook_usage", "codebook_perplexity")
    assert found[6] == {**{name: result[name] for name in figures}, **result["distances"][network]}


def test_guidance_is_the_models_or_what_is_asked_for(train, tokenizer, reference, network, tmp_path: Path) -> None:
    own, none = train("own"), train("none", options={"evaluate_guidance": 0.0})
    same_weights(own, none)
    assert evaluations(own) != evaluations(none)
    assert evaluations(own) == evaluations(train("said", options={"evaluate_guidance": 3.0}))


def test_tensorboard_gets_the_figures(train, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(options={"tensorboard": True})
    events = reader.EventAccumulator(str(run / "tensorboard")).Reload()
    found = evaluations(run)
    for name in found[2]:
        scalars = events.Scalars(f"eval/{name}")
        assert [scalar.step for scalar in scalars] == [2, 4, 6]
        assert [scalar.value for scalar in scalars] == pytest.approx([found[step][name] for step in (2, 4, 6)])


def test_images_of_an_adm_file_give_precision_and_recall(tokenizer, network: str, reference, tmp_path: Path) -> None:
    """Their features are computed at the first evaluation and kept, as `evaluate samples` computes them."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=pixels)
    judge, decoder = load_network(network), load_tokenizer(tokenizer / "model")
    vectors = judge(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))["pooled"]
    facts = {"moments": read_reference(reference).moments, "facts": judge.facts, "kind": "ADM", "sha256": "abc"}
    labels = [number % 3 for number in range(12)]
    torch.manual_seed(0)
    found = []
    for given in (Reference(**facts, images=tmp_path / "adm.npz"), Reference(**facts, vectors=vectors)):
        evaluation = online.SampleEvaluation(decoder, judge, given, labels, SamplingParams())
        place = online.Workplace(tmp_path / "work", Ranks(), lambda: False)
        found.append(evaluation(Generator(GENERATOR).eval(), place))
    assert found[0] == found[1] and {"kernel_distance", "precision", "recall"} <= found[0].keys()
    assert [folder.name[:10] for folder in (tmp_path / "work").iterdir()] == ["reference-"]


# --- training is the same --------------------------------------------------------------------------------------------


def test_looking_on_changes_nothing(train, tokenizer: Path, photos, network: str, tmp_path, monkeypatch) -> None:
    """Dropout, class dropout and the discriminator's first weights are drawn as without evaluation."""
    monkeypatch.setattr("alitok_fast.training.adversary.Discriminator", lambda: Discriminator(32, 2))
    same_training(train("with"), train("without", evaluate_every=0))
    same_training(tokenizer, train_tokens(photos, tmp_path / "tokenizer"))
    phases = (Phase(2, 1e-3), Phase(4, 1e-3, adversarial=0.1))
    for name, every in (("gan", 2), ("plain", 0)):
        train_tokens(photos, tmp_path / name, phases=phases, evaluate_every=every, evaluate_network=network)
    same_training(tmp_path / "gan", tmp_path / "plain")
    assert "frechet_distance" in evaluations(tmp_path / "gan")[6]


def test_its_time_is_not_the_trainings(train, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out: dict[type, list[float]] = {Meter: [], Loader: []}
    for kind, seconds in left_out.items():
        monkeypatch.setattr(kind, "leave_out", lambda self, taken, seconds=seconds: seconds.append(taken))
    taken = [entry[EVALUATED] for entry in log_of(train()) if EVALUATED in entry]
    assert left_out == {Meter: taken, Loader: taken} and len(taken) == 3


def test_seconds_that_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("alitok_fast.training.meter.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("alitok_fast.data.loader.monotonic", lambda: now[0])
    meter = Meter()
    with Loader(lambda epoch, sample: (sample,), DataOrder(8, 4, 0), 0, 2) as loader:
        loader.leave_out(5.0)  # before the first batch nothing counts
        next(loader)
        meter.add({}, None, samples=4)
        now[0] += 12
        for watch in (meter, loader):
            watch.leave_out(10.0)
        assert meter.summary()["samples_per_second"] == 2 and loader.seconds == 2


# --- killed and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_killed_at_an_evaluation(train, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Step 4 is saved, then evaluated: a run that goes on from there does it once."""
    whole = train("whole")
    call, seen = online.SampleEvaluation.__call__, []

    def killed(self, generator, place):
        seen.append(generator)
        if len(seen) == 2 and moment == "before":
            raise SystemExit
        if len(seen) == 2 and moment == "within":
            call(self, generator, replace(place, stop=lambda: sys.exit()))
        return call(self, generator, place)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(online.SampleEvaluation, "__call__", killed)
        if moment == "after":
            step = _Trainer.step
            patch.setattr(_Trainer, "step", lambda self, at, *more: sys.exit() if at == 4 else step(self, at, *more))
        train("run")
    assert state_of(whole.parent / "run")["step"] == 4
    assert list(evaluations(whole.parent / "run")) == ([2, 4] if moment == "after" else [2])
    run = train("run", resume=True)
    assert evaluations(run) == evaluations(whole)
    same_training(whole, run)
    assert train("run", resume=True) and evaluations(run) == evaluations(whole)  # of a finished run nothing is missing


def test_asked_to_end_it_saves_and_evaluates_when_it_goes_on(train, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("whole", save_every=100)
    noted: list[Interrupts] = []
    enter, call = Interrupts.__enter__, online.SampleEvaluation.__call__

    def interrupted(self, generator, place):
        noted[0].seen = True
        return call(self, generator, place)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Interrupts, "__enter__", lambda self: noted.append(self) or enter(self))
        patch.setattr(online.SampleEvaluation, "__call__", interrupted)
        train("run", save_every=100)
    run = whole.parent / "run"
    assert state_of(run)["step"] == 2 and evaluations(run) == {}
    train("run", resume=True, save_every=100)
    assert evaluations(run) == evaluations(whole)
    same_training(whole, run)


def test_it_may_begin_and_change_when_a_run_goes_on(train) -> None:
    run = train(evaluate_every=0, steps=4)
    assert evaluations(run) == {} and "evaluate_every" not in (run / "config.json").read_text()
    train(resume=True, steps=4)  # it is made up for
    assert list(evaluations(run)) == [4]
    train(resume=True, steps=6, evaluate_images=6)
    assert list(evaluations(run)) == [4, 6]
    assert json.loads((run / "config.json").read_text())["train"]["evaluate_images"] == 6


def test_features_of_originals_are_computed_once(photos: Path, network: str, tmp_path: Path, monkeypatch) -> None:
    seen: list[int] = []
    load = online.load_network

    def counting(*arguments: Any) -> Any:
        judge = load(*arguments)
        return replace(judge, extract=lambda images: seen.append(len(images)) or judge.extract(images))

    monkeypatch.setattr(online, "load_network", counting)
    settings = dict(evaluate_network=network, evaluate_every=2, evaluate_images=20)
    train_tokens(photos, tmp_path / "run", steps=4, **settings)
    assert seen == [20, 20, 20]  # the originals, then two reconstructions of them
    train_tokens(photos, tmp_path / "run", resume=True, steps=6, **settings)
    assert seen == 4 * [20]
    kept = [folder.name for folder in (tmp_path / "run" / "evaluation").iterdir()]
    assert len(kept) == 1 and kept[0].startswith("originals-")
    train_tokens(photos, tmp_path / "run", resume=True, steps=8, **{**settings, "evaluate_images": 30})
    assert seen == [*4 * [20], 30, 30]


def test_pictures_are_evenly_spaced(photos: Path) -> None:
    source = open_source(photos, "val", 16)
    some = online.EvenlySpaced(source, 5)
    assert len(some) == 5 and list(some.labels) == [source.labels[i] for i in (0, 7, 14, 21, 28)]
    assert (some.image(3) == source.image(21)).all()
    images = online.ReconstructionEvaluation.open(source, 5, 16, None, None, Ranks()).images
    assert images.count == 5 and "5" in str(images.facts["count"])
    whole = online.ReconstructionEvaluation.open(source, 5000, 16, None, None, Ranks()).images
    assert whole.count == 36 and whole.facts["fingerprint"] != images.facts["fingerprint"]


# --- what is said, and mistakes --------------------------------------------------------------------------------------


def test_doubts_are_said_once(train, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train()
    said = [record.message for record in caplog.records]
    assert [line.partition(",")[0] for line in said] == [
        "evaluation: the images are 36",
        "evaluation: the reference has 24 images: the fewer",
    ]


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"tokenizer": None}, {}, r"evaluate_every: expected a tokenizer \(--tokenizer\) .* got none"),
        ({"reference": None}, {}, r"evaluate_every: expected a reference \(--reference\) .* got none"),
        ({}, {"evaluate_images": 10}, r"evaluate_images: expected a multiple of the 3 classes \(9\), got 10"),
        ({"evaluate_weights": "nowhere.pth"}, {}, "nowhere.pth"),
        ({"reference": "nowhere.safetensors"}, {}, "nowhere.safetensors"),
        ({"evaluate_guidance": -1.0}, {}, "guidance_scale: expected a number in"),
    ],
)
def test_mistakes_are_named_before_the_first_step(train, tmp_path, options, settings, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        train(options=options, **settings)
    assert not (tmp_path / "run").exists()


def test_statistics_of_something_else_are_named(train, photos: Path, network: str, reference, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    alitok("evaluate", "reference", "--data", photos, "--size", 8, "--network", network, "--out", small)
    with pytest.raises(ValueError, match="reference: expected images of 16 pixels, got 8"):
        train(options={"reference": small})
    theirs = read_reference(reference)
    for facts, message in (
        ({**theirs.facts, "weights": "others"}, "reference: expected statistics of .* with weights .*, got others"),
        ({**theirs.facts, "network": "nothing"}, "reference: expected one of inception, .*, got 'nothing'"),
    ):
        write_reference(tmp_path / "other.safetensors", replace(theirs, facts=facts))
        with pytest.raises(ValueError, match=message):
            train(options={"reference": tmp_path / "other.safetensors"})


def test_mistakes_about_pictures_are_named(photos: Path, tmp_path: Path, network: str) -> None:
    for settings, message in (
        ({"evaluate_network": "nothing"}, "evaluate_network: expected one of inception, .*, got 'nothing'"),
        ({"evaluate_weights": "x.pth"}, "evaluate_weights: expected the network"),
        ({"held_out": None}, "evaluate_every: expected held-out pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            train_tokens(photos, tmp_path / "run", **ONLINE, **settings)
    assert not (tmp_path / "run").exists()
    source, small = open_source(photos, image_size=8), replace(TOKENIZER, image_size=8)
    with pytest.raises(ValueError, match="evaluate_every: expected images of at least 11 pixels, for SSIM, got 8"):
        train_tokenizer(
            source, tmp_path / "run", 1, small, TokenizerTrainConfig(**SHORT, **ONLINE), held_out=source, workers=0
        )


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page(
    photos: Path, network: str, tokenizer, cache, reference, tmp_path, monkeypatch, capsys
) -> None:
    """As docs/training.md has them, with short runs of tiny models."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    section = page.partition("## Evaluation while training\n")[2].partition("\n## ")[0]
    commands = [line.split() for line in section.splitlines() if line.startswith("    alitok-fast train")]
    assert [command[2] for command in commands] == ["tokenizer", "generator"]
    monkeypatch.chdir(tmp_path)
    Path("PHOTOS").symlink_to(photos)
    Path("train.safetensors").symlink_to(reference)
    small = [f"--set=model.{name}={value}" for name, value in TOKENIZER.to_dict().items() if value is not None]
    sizes = {"tokenizer": small, "generator": [f"--set=model.{n}={v}" for n, v in GENERATOR.to_dict().items()]}
    short = [f"--set={name}={value}" for name, value in {**SHORT, **ONLINE}.items()]
    places = {"runs/stage2/model": tokenizer / "model", "runs/tokens": cache, "inception": network}
    for command in commands:
        kind = command[2]
        alitok(*[places.get(word, word) for word in command[1:]], *short, *sizes[kind], "--no-progress")
        out = Path(command[command.index("--out") + 1])
        assert list(evaluations(out)) == [2, 4, 6] and "frechet_distance" in evaluations(out)[6]
    assert "PHOTOS/val: 36 pictures in 3 classes" in capsys.readouterr().out


def test_held_out_pictures_are_found_or_asked_for(photos: Path, tmp_path: Path, capsys) -> None:
    small = [f"--set=model.{name}={value}" for name, value in TOKENIZER.to_dict().items() if value is not None]
    common = ["--stage", 1, *small, *(f"--set={name}={value}" for name, value in {**SHORT, **ONLINE}.items())]
    common += ["--workers", 0, "--no-progress"]
    flat = photos / "val"
    with pytest.raises(AssertionError):
        alitok("train", "tokenizer", "--data", flat, "--out", tmp_path / "none", *common)
    message = "evaluate_data: expected held-out pictures, got none (split: expected 'train'"
    assert message in (said := capsys.readouterr().err) and "--evaluate-data names others" in said
    alitok("train", "tokenizer", "--data", flat, "--evaluate-data", photos, "--out", tmp_path / "other", *common)
    alitok("train", "tokenizer", "--data", flat, "--evaluate-data", flat, "--out", tmp_path / "same", *common)
    one, other = evaluations(tmp_path / "other"), evaluations(tmp_path / "same")
    assert one == other and set(one) == {2, 4, 6} and "psnr" in one[2] and "frechet_distance" not in one[2]
    with pytest.raises(AssertionError):
        own = ["--evaluate-split", "elsewhere", "--out", tmp_path / "none"]
        alitok("train", "tokenizer", "--data", photos, *own, *common)
    assert "evaluate_data: expected held-out pictures, got none (split: expected one of" in capsys.readouterr().err


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["generator", "tokenizer"])
def test_two_processes_evaluate_as_one(
    tokenizer, cache, reference, photos, network, tmp_path, kind: str, parallel: str
) -> None:
    """A learning rate of nearly nothing keeps the weights of both runs the same but for rounding; the second, resumed
    from the first's end by two processes, evaluates the same weights, and so has the same bits."""
    settings = {**SHORT, **ONLINE, "steps": 2, "evaluate_every": 0, "ema_decay": 0.5 if kind == "tokenizer" else 0.0}
    one = tmp_path / "one"
    online_run(1, kind, one, settings, cache, tokenizer, reference, photos, network)
    for name, processes in (("alone", 1), ("both", 2)):
        shutil.copytree(one, tmp_path / name)
        again = {**settings, "evaluate_every": 2, "parallel": parallel}
        online_run(processes, kind, tmp_path / name, again, cache, tokenizer, reference, photos, network, "--resume")
    assert evaluations(tmp_path / "both") == evaluations(tmp_path / "alone") and evaluations(tmp_path / "both")[2]


def online_run(processes: int, kind: str, out: Path, settings: dict, *inputs: Any) -> None:
    cache, tokenizer, reference, photos, network, *more = inputs
    model = TOKENIZER if kind == "tokenizer" else GENERATOR
    sets = [f"--set=model.{name}={value}" for name, value in model.to_dict().items() if value is not None]
    sets += [f"--set={name}={value}" for name, value in settings.items()]
    given = ["--stage", 1, "--data", photos, "--workers", 0, "--evaluate-network", network]
    if kind == "generator":
        given = ["--cache", cache, "--tokenizer", tokenizer / "model", "--reference", reference]
    command = ["-m", "alitok_fast.cli", "train", kind, "--out", out, *given, *sets, *more, "--no-progress"]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *launch, *map(str, command)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
