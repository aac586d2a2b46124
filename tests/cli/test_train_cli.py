"""The commands of training, one after the other, on tiny data and the demo's sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from training.conftest import idx_folder  # noqa: F401 - a fixture
from typer.testing import CliRunner

from alitok_fast.cli.train import app, tokenize_command
from alitok_fast.models.loading import load_generator, load_tokenizer

SHORT = ["--set", "steps=2", "--set", "warmup=1", "--set", "batch_size=4", "--set", "precision=fp32", "--no-progress"]


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


def test_mistakes_are_named(commands: typer.Typer, idx_folder: Path, tmp_path: Path) -> None:
    train = ["train", "tokenizer", "--data", str(idx_folder), "--out", str(tmp_path / "x"), "--no-progress"]
    for extra, message in (
        (["--stage", "3"], "stage: expected 1 or 2, got 3"),
        (["--stage", "2"], "stage1: expected a stage-1 checkpoint for stage 2"),
        (["--stage", "1", "--preset", "z"], "expected a tokenizer preset"),
        (["--stage", "1", "--set", "lr=fast"], "--set lr: expected a number such as 0.001, got 'fast'"),
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
