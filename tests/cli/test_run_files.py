"""Run files on the command line: shown, edited, run, stored, run again, resumed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from training.conftest import write_stripes
from typer.testing import CliRunner

from alitok_fast.cli.train import app, tokenize_command
from alitok_fast.inference.sampler import sample
from alitok_fast.models.loading import load_generator, load_tokenizer
from alitok_fast.training.run_config import RunConfig, combine
from alitok_fast.training.run_layers import preset_layer, preset_names, read_run_file

TINY = """
[model]
image_size = 8
patch_size = 4
codebook_size = 16
code_dim = 8
encoder_width = 16
encoder_layers = 1
encoder_heads = 2
decoder_width = 16
decoder_layers = 1
decoder_heads = 2
num_buffer_tokens = 2
{model}
[training]
steps = 3
warmup = 1
batch_size = 4
precision = "fp32"
{training}
[data]
path = "stripes"
workers = 0
[evaluation]
log_every = 1
pictures_every = 0
"""
TINY_GENERATOR = """
kind = "generator"
model = {width = 16, num_layers = 1, num_heads = 2, grid = 2, codebook_size = 16, num_classes = 3, hidden_multiple = 8}
training = {steps = 3, warmup = 1, batch_size = 4, precision = "fp32"}
evaluation = {pictures_every = 0}
"""


@pytest.fixture(scope="module")
def commands() -> typer.Typer:
    both = typer.Typer()
    both.add_typer(app, name="train")
    both.command("tokenize")(tokenize_command)
    return both


@pytest.fixture
def run(commands: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """run("train", "tokenizer", ...) in a folder with the data `stripes`; the command's output. Errors are raised."""
    (tmp_path / "stripes").mkdir()
    write_stripes(tmp_path / "stripes")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        shown = "presets" in arguments
        words = [str(a) for a in arguments] + ([] if shown else ["--no-progress"])
        result = CliRunner().invoke(commands, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return call


def tiny(folder: Path, name: str = "tiny.toml", model: str = "stage = 1", training: str = "") -> Path:
    (folder / name).write_text(TINY.format(model=model, training=training))
    return folder / name


def stored(folder: Path, kind: str = "tokenizer") -> RunConfig:
    return combine(kind, [preset_layer(kind, {}), read_run_file(folder / "run.toml", kind)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["model"]


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


# --- presets --------------------------------------------------------------------------------------------------------


def test_presets_are_listed_and_shown(run) -> None:
    kinds = ["tokenizer: demo, photos-64, 256, 512\n", "generator: demo, photos-64, b, l, xl, b-512, l-512, xl-512\n"]
    assert run("train", "presets") == "".join(kinds)
    assert run("train", "presets", "--kind", "tokenizer") == kinds[0]
    for kind in ("tokenizer", "generator"):
        for name in preset_names(kind):
            text = run("train", "presets", "--show", name, *(["--kind", kind] if name in ("demo", "photos-64") else []))
            Path("run.toml").write_text(text)
            assert stored(Path(), kind) == combine(kind, [preset_layer(kind, {"model": name, "training": name}, 1)])
    for name in ("256", "photos-64"):
        assert "stage = 2" in run("train", "presets", "--show", name, "--stage", 2)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--show", "demo"], "kind: expected --kind tokenizer or --kind generator, since both have 'demo'"),
        (["--show", "25"], "show: unknown preset '25'; the nearest is '256'"),
        (["--show", "b", "--kind", "tokenizer"], "show: unknown preset 'b'; expected one of demo, photos-64, 256, 512"),
        (["--show", "b", "--stage", "1"], "stage: expected none of a generator, got 1"),
        (["--show", "256", "--stage", "3"], "stage: expected 1 or 2, got 3"),
        (["--kind", "x"], "kind: expected tokenizer or generator, got 'x'"),
    ],
)
def test_mistakes_about_presets_are_named(run, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("train", "presets", *options)


def test_a_preset_that_was_shown_saved_and_edited_runs(run) -> None:
    text = run("train", "presets", "--show", "demo", "--kind", "tokenizer")
    edited = text.replace('# path = ""', 'path = "stripes"').replace("encoder_layers = 4", "encoder_layers = 1")
    for name, value in (("steps", 2), ("warmup", 1), ("batch_size", 4), ("precision", '"fp32"'), ("workers", 0)):
        edited = "\n".join(f"{name} = {value}" if s.startswith(f"{name} = ") else s for s in edited.splitlines())
    Path("own.toml").write_text(edited)
    run("train", "tokenizer", "--config", "own.toml", "--out", "out")
    assert load_tokenizer("out/model").config.encoder_layers == 1


# --- stored, run again, resumed -------------------------------------------------------------------------------------


def test_the_stored_file_alone_repeats_the_run(run, tmp_path: Path) -> None:
    run("train", "tokenizer", "--config", tiny(tmp_path), "--set", "seed=7", "--out", "x", "--set", "lr=0.01")
    kept = stored(tmp_path / "x")
    assert (kept.training.seed, kept.training.lr, kept.model.codebook_size) == (7, 0.01, 16)
    assert kept.data.path == str(tmp_path / "stripes")
    (tmp_path / "tiny.toml").unlink()
    run("train", "tokenizer", "--config", "x/run.toml", "--out", "y")
    assert same(tmp_path / "x", tmp_path / "y") and stored(tmp_path / "y") == kept
    assert (tmp_path / "x" / "run.toml").read_text() == (tmp_path / "y" / "run.toml").read_text()
    run("train", "tokenizer", "--config", "x/run.toml", "--set", "seed=8", "--out", "z")
    assert not same(tmp_path / "x", tmp_path / "z")


@pytest.mark.parametrize("config", [[], ["--config", "x/run.toml"]])
def test_a_run_goes_on_from_its_folder_alone(run, tmp_path: Path, config: list[str]) -> None:
    run("train", "tokenizer", "--config", tiny(tmp_path), "--out", "x")
    (tmp_path / "tiny.toml").unlink()
    run("train", "tokenizer", *config, "--out", "x", "--resume", "--set", "steps=5")
    assert stored(tmp_path / "x").training.steps == 5
    run("train", "tokenizer", *config, "--out", "x", "--resume")
    for changed, message in (
        (["--set", "batch_size=2"], "train.batch_size: expected 4, got 2"),
        (["--set", "model.code_dim=4"], "model.code_dim: expected 8, got 4"),
        (["--preset", "256"], "preset: expected none, since x/run.toml has every setting, got '256'"),
        (["--stage", "2"], "kind: expected 'tokenizer stage 1', got 'tokenizer stage 2'"),
    ):
        with pytest.raises(ValueError, match=message):
            run("train", "tokenizer", *config, "--out", "x", "--resume", *changed)
    assert stored(tmp_path / "x").training.batch_size == 4


def test_a_run_of_before_run_files_goes_on_with_its_data_named(run, tmp_path: Path) -> None:
    run("train", "tokenizer", "--config", tiny(tmp_path), "--out", "x")
    (tmp_path / "x" / "run.toml").unlink()
    with pytest.raises(ValueError, match="data: expected --data, or path in \\[data\\] of the run file, got none"):
        run("train", "tokenizer", "--out", "x", "--resume")
    run("train", "tokenizer", "--out", "x", "--resume", "--data", "stripes", "--workers", 0, "--set", "steps=4")
    assert stored(tmp_path / "x").training.steps == 4


def test_options_override_set_and_set_the_file(run, tmp_path: Path) -> None:
    shutil.copytree("stripes", "other")
    told = ["--set", "data.path=nowhere", "--set", "steps=2", "--set", "evaluation.log_every=2"]
    run("train", "tokenizer", "--config", tiny(tmp_path), *told, "--data", "other", "--out", "x")
    kept = stored(tmp_path / "x")
    assert kept.data.path == str(tmp_path / "other") and kept.data.workers == 0
    assert (kept.training.steps, kept.training.log_every, kept.training.batch_size) == (2, 2, 4)


def test_files_of_the_users_own_are_kept(run, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    file = tiny(tmp_path / "own", "run.toml")
    before = file.read_text()
    with pytest.raises(ValueError, match="out: expected a new folder or a run's, got another own/run.toml; choose"):
        run("train", "tokenizer", "--config", file, "--set", "data.path=stripes", "--out", "own")
    assert file.read_text() == before


def test_the_kind_must_fit(run, tmp_path: Path) -> None:
    run("train", "tokenizer", "--config", tiny(tmp_path), "--out", "x")
    with pytest.raises(ValueError, match="x/run.toml: kind: expected 'generator', as this command trains"):
        run("train", "generator", "--config", "x/run.toml", "--out", "y")
    with pytest.raises(ValueError, match="out: expected the run of a generator, got 'tokenizer stage 1' in x"):
        run("train", "generator", "--out", "x", "--resume")
    with pytest.raises(ValueError, match="cache: expected --cache, or cache in \\[data\\] of the run file, got none"):
        run("train", "generator", "--out", "y")


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b"a = " + b"[" * 500_000)
    command = [sys.executable, "-m", "alitok_fast.cli", "train", "tokenizer", "--config", file, "--out", tmp_path / "x"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert found.stderr.startswith(f"alitok-fast: {file}: expected TOML"), found.stderr


# --- sizes of one's own ---------------------------------------------------------------------------------------------


def test_an_alignment_of_ones_own_from_pictures_to_samples(run, tmp_path: Path) -> None:
    """No prefix, a causal encoder, no auxiliary loss, no buffer tokens; stage 2 takes its sizes from stage 1."""
    study = "stage = 1\nprefix_tokens = 0\ncausal_encoder = true\nauxiliary_loss = false\ncausal_decoder = false"
    run("train", "tokenizer", "--config", tiny(tmp_path, model=study), "--out", "first")
    first = load_tokenizer("first/model")
    assert (first.config.num_tokens, first.config.causal_encoder, first.config.decoder_is_causal) == (4, True, False)
    short = ["--set", "steps=2", "--set", "warmup=1", "--set", "batch_size=4", "--set", "precision=fp32"]
    data = ["--data", "stripes", "--workers", 0]
    own = ["--set", "model.num_buffer_tokens=0", "--set", "model.causal_decoder=true"]
    run("train", "tokenizer", "--stage", 2, "--stage1", "first/model", *data, *short, *own, "--out", "second")
    second = load_tokenizer("second/model")
    assert second.config.decoder_is_causal and second.decoder.class_embedding is None
    kept = stored(tmp_path / "second")
    assert kept.model == second.config and kept.start.stage1 == str(tmp_path / "first" / "model")
    shutil.move("first", "elsewhere")  # a run that goes on has the weights that it began with
    run("train", "tokenizer", "--out", "second", "--resume", "--set", "steps=3")
    assert load_tokenizer("second/model").config == second.config

    run("tokenize", "--data", "stripes", "--tokenizer", "second/model", "--crops", 1, "--out", "tokens")
    (tmp_path / "g.toml").write_text(TINY_GENERATOR)
    train = ["train", "generator", "--config", "g.toml", "--cache", "tokens", "--out", "g"]
    with pytest.raises(ValueError, match="cache: expected tokens 7 as in .*, got 4; prefix_tokens 0 would fit"):
        run(*train)
    run(*train, "--set", "model.prefix_tokens=0")
    assert stored(tmp_path / "g", "generator").model.num_tokens == 4
    assert sample(load_generator("g/model"), [0, 1, 2]).shape == (3, 4)


def test_sizes_that_contradict_the_model_to_start_from_are_named(run, tmp_path: Path) -> None:
    run("train", "tokenizer", "--config", tiny(tmp_path), "--out", "x")
    two = ["train", "tokenizer", "--data", "stripes", "--workers", 0, "--out", "y", "--set", "steps=2"]
    two += ["--set", "warmup=1", "--set", "precision=fp32"]
    with pytest.raises(ValueError, match="--set model.code_dim: expected 8, as in .*/x/model, got 4"):
        run(*two, "--stage", 2, "--stage1", "x/model", "--set", "model.code_dim=4")
    other = (
        tiny(tmp_path, "two.toml", model="stage = 2").read_text().replace("encoder_width = 16", "encoder_width = 32")
    )
    (tmp_path / "two.toml").write_text(other)
    with pytest.raises(ValueError, match="two.toml: model.encoder_width: expected 16, as in .*/x/model, got 32"):
        run("train", "tokenizer", "--config", "two.toml", "--stage1", "x/model", "--out", "y")
    run(*two, "--stage", 1, "--init", "x/model", "--set", "batch_size=4")
    assert stored(tmp_path / "y").model == load_tokenizer("x/model").config


def test_a_generator_to_start_from_keeps_its_sizes_and_takes_other_dropout(run, tmp_path: Path) -> None:
    run("train", "tokenizer", "--config", tiny(tmp_path), "--out", "x")
    run("tokenize", "--data", "stripes", "--tokenizer", "x/model", "--crops", 1, "--out", "tokens")
    (tmp_path / "g.toml").write_text(TINY_GENERATOR)
    run("train", "generator", "--config", "g.toml", "--cache", "tokens", "--out", "g")
    short = ["--cache", "tokens", "--set", "steps=2", "--set", "warmup=1", "--set", "precision=fp32"]
    again = ["train", "generator", "--init", "g/model", *short, "--set", "batch_size=4", "--out", "again"]
    with pytest.raises(ValueError, match="--set model.grid: expected 2, as in .*/g/model, got 3"):
        run(*again, "--set", "model.grid=3")
    run(*again, "--set", "model.dropout=0.25", "--tokenizer", "x/model", "--set", "pictures_every=2")
    gen = load_generator("again/model")
    assert gen.config.dropout == 0.25 and gen.config.width == 16
    assert list((tmp_path / "again" / "pictures").iterdir())
    kept = stored(tmp_path / "again", "generator")
    assert kept.watch.tokenizer == str(tmp_path / "x" / "model") and kept.start.init == str(tmp_path / "g" / "model")
