"""The commands of training, one after the other, on tiny data and the demo's sizes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from training.conftest import write_stripes
from typer.testing import CliRunner

from alitok_fast.cli.train import app, tokenize_command
from alitok_fast.models.loading import load_generator, load_tokenizer

SHORT = ["--set", "steps=2", "--set", "warmup=1", "--set", "batch_size=4", "--set", "precision=fp32", "--no-progress"]


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("stripes"))


@pytest.fixture(scope="module")
def commands() -> typer.Typer:
    both = typer.Typer()
    both.add_typer(app, name="train")
    both.command("tokenize")(tokenize_command)
    return both


def run(commands: typer.Typer, *arguments: object) -> str:
    result = CliRunner().invoke(commands, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_pictures_to_a_generator(commands: typer.Typer, idx_folder: Path, tmp_path: Path) -> None:
    train = ["train", "tokenizer", "--data", idx_folder]
    run(commands, *train, "--stage", 1, "--out", tmp_path / "stage1", *SHORT)
    tokens = ["tokenize", "--data", idx_folder, "--tokenizer", tmp_path / "stage1" / "model", "--no-progress"]
    assert "24 images x 2 crops x 73 tokens" in run(commands, *tokens, "--crops", 2, "--out", tmp_path / "tokens")
    stage1 = ["--stage1", tmp_path / "stage1" / "model"]
    run(commands, *train, "--stage", 2, *stage1, "--out", tmp_path / "stage2", *SHORT)
    run(commands, "train", "generator", "--cache", tmp_path / "tokens", "--out", tmp_path / "generator", *SHORT)
    assert load_tokenizer(tmp_path / "stage2" / "model").config.stage == 2
    assert load_generator(tmp_path / "generator" / "model").config.num_classes == 10


def test_what_was_found_is_said_first(commands: typer.Typer, idx_folder: Path, tmp_path: Path) -> None:
    train = ["train", "tokenizer", "--data", idx_folder, "--stage", 1, "--out", tmp_path / "run"]
    first, last = run(commands, *train, *SHORT).splitlines()
    assert first == f"{idx_folder.name}/train: 24 pictures in 3 classes" and last == str(tmp_path / "run" / "model")
    tokens = ["tokenize", "--data", idx_folder, "--tokenizer", "demo", "--crops", 1, "--out", tmp_path / "tokens"]
    assert run(commands, *tokens, "--no-progress").splitlines()[0] == first
    generator = run(commands, "train", "generator", "--cache", tmp_path / "tokens", "--out", tmp_path / "g", *SHORT)
    assert generator.splitlines()[0] == f"{idx_folder.name}/train: 24 images x 1 crop x 73 tokens in 3 classes"


def test_the_run_folder_knows_its_settings(commands: typer.Typer, idx_folder: Path, tmp_path: Path) -> None:
    out = ["--data", idx_folder, "--out", tmp_path / "run", "--no-progress"]
    run(commands, "train", "tokenizer", *out, "--stage", 1, *SHORT)
    again = run(commands, "train", "tokenizer", *out, "--resume", "--set", "steps=3")
    assert again.splitlines()[-1] == str(tmp_path / "run" / "model")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert (settings["steps"], settings["warmup"], settings["batch_size"], settings["precision"]) == (3, 1, 4, "fp32")
    for extra, message in (
        (["--set", "batch_size=2"], "train.batch_size: expected 4, got 2"),
        (["--set", "steps=2"], "steps: expected at least 3"),
        (["--preset", "256"], "preset: expected none, since .*run.toml has every setting, got '256'"),
        (["--stage", "2"], "expected the settings|stage1: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments = [str(a) for a in ["train", "tokenizer", *out, "--resume", *extra]]
            CliRunner().invoke(commands, arguments, catch_exceptions=False)
    (tmp_path / "run" / "config.json").write_text('{"kind": "gen')
    with pytest.raises(ValueError, match="config.json: expected a run's settings"):
        arguments = [str(a) for a in ["train", "tokenizer", *out, "--resume"]]
        CliRunner().invoke(commands, arguments, catch_exceptions=False)


def test_what_diverges_is_one_line(idx_folder: Path, tmp_path: Path) -> None:
    train = ["train", "tokenizer", "--data", str(idx_folder), "--stage", "1", "--out", str(tmp_path / "x"), *SHORT]
    for setting in ("lr=1e38", "warmup=0", "steps=3", "max_grad_norm=1e30"):
        train += ["--set", setting]
    found = subprocess.run([sys.executable, "-m", "alitok_fast.cli", *train], capture_output=True, text=True)
    assert found.returncode == 1 and re.fullmatch(
        r"alitok-fast: .*: expected a finite number, got .* at step \d of phase 1; no checkpoint was written yet.*\n",
        found.stderr,
    ), found.stderr
    assert not (tmp_path / "x" / "model").exists()


def test_counts_are_checked_before_anything(commands: typer.Typer, idx_folder: Path, tmp_path: Path) -> None:
    tokens = ["tokenize", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "x")]
    train = ["train", "tokenizer", "--stage", "1", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "x")]
    for command, option, message in (
        (tokens, ["--batch-size", "-5"], "batch_size: expected a whole number of at least 1, got -5"),
        (tokens, ["--batch-size", "0"], "batch_size: expected a whole number"),
        (tokens, ["--crops", "-1"], "crops: expected one of 1, 2, 10, got -1"),
        (tokens, ["--workers", "0"], "workers: expected a whole number"),
        (train, ["--workers", "-1"], "workers: expected a whole number"),
        (train, ["--set", "batch_size=-4"], "batch_size: expected at least 1, got -4"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(commands, [*command, *option], catch_exceptions=False)
    assert not (tmp_path / "x").exists()


def test_files_of_others_are_kept_unless_forced(commands: typer.Typer, idx_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"mine": 1}')
    train = ["train", "tokenizer", "--data", str(idx_folder), "--stage", "1", "--out", str(tmp_path), *SHORT]
    with pytest.raises(ValueError, match="config.json.*--force"):
        CliRunner().invoke(commands, train, catch_exceptions=False)
    assert (tmp_path / "config.json").read_text() == '{"mine": 1}'
    run(commands, *train, "--force")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "import alitok_fast.cli.train as train\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(train.app, ['tokenizer', '--help'])\n"
        "assert result.exit_code == 0 and '--workers' in result.output, result.output\n"
        "print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])\n"
    )
    # alitok_fast.cli itself imports every command; only this module is looked at.
    package = "import sys, types; m = types.ModuleType('alitok_fast.cli'); import alitok_fast, os\n"
    package += (
        "m.__path__ = [os.path.join(os.path.dirname(alitok_fast.__file__), 'cli')]; sys.modules[m.__name__] = m\n"
    )
    found = subprocess.run([sys.executable, "-c", package + code], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.strip() == "[]", found.stdout + found.stderr


def test_mistakes_are_named(commands: typer.Typer, idx_folder: Path, tmp_path: Path) -> None:
    train = ["train", "tokenizer", "--data", str(idx_folder), "--out", str(tmp_path / "x"), "--no-progress"]
    for extra, message in (
        (["--stage", "3"], "stage: expected 1 or 2, got 3"),
        (["--stage", "2"], "stage1: expected a stage-1 checkpoint for stage 2"),
        (["--stage", "1", "--preset", "z"], "expected a tokenizer preset"),
        (["--stage", "1", "--set", "lr=fast"], "--set lr: expected a number such as 0.0001, got 'fast'"),
        (["--stage", "1", "--split", "half"], "split: expected one of"),
        (
            ["--stage", "1", "--set", "steps=30"],
            "--set steps: expected at least the 100 steps of warm-up, got 30; .* such as --set warmup=3$",
        ),
        (["--stage", "1", "--set", "steps=30", "--set", "warmup=31"], r"warmup: expected 0 to steps \(30\), got 31"),
        (["--stage", "1", "--device", "gpu"], "device: expected cpu, cuda or cuda:N, got 'gpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(commands, train + extra, catch_exceptions=False)
    assert not (tmp_path / "x").exists()
