"""Several processes and one, with the same batches: the same losses, the same checkpoints, whichever goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.processes import write_photographs

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("processes.py")
BOTH = dict(
    steps=20, batch_size=8, lr=3e-5, warmup=4, log_every=1, save_every=5, pictures_every=10, ema_decay=0.9,
    phases=[{"steps": 6, "lr": 3e-5}, {"steps": 14, "lr": 3e-5, "end_lr": 1e-5, "adversarial": 0.05}],
    adaptive_adversarial=True, r1=0.1, lecam=0.1,
)  # fmt: skip
GENERATOR = dict(steps=20, batch_size=8, lr=1e-3, warmup=4, log_every=1, save_every=5, grad_accumulation=2)


def start(processes: int, kind: str, data: Path, out: Path, resume: bool = False, **settings: Any) -> subprocess.Popen:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [str(SCRIPT), kind, str(data), str(out), str(int(resume)), json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*command, *arguments], env=environment, start_new_session=True, **pipes)


def run(*arguments: Any, **settings: Any) -> None:
    process = start(*arguments, **settings)
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-3000:]


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def state_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoint" / "state.pt", weights_only=True)


def same_losses(one: Path, other: Path, keys: tuple[str, ...]) -> None:
    first, second = log_of(one), log_of(other)
    assert [entry["step"] for entry in first] == [entry["step"] for entry in second] == list(range(1, 21))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in keys:
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-7), (a["step"], key)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def tokenizer_alone(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    run(1, "tokenizer", photographs, out, **BOTH)
    return out


LOSSES = ("loss", "mse", "aux", "discriminator", "logits_real", "logits_fake", "r1", "lecam", "adversarial")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_processes_train_the_tokenizer_as_one(photographs, tokenizer_alone, tmp_path, parallel: str) -> None:
    """Codebook update, discriminator, regularisers and adaptive weight included."""
    run(4, "tokenizer", photographs, tmp_path / "four", **BOTH, parallel=parallel)
    same_losses(tokenizer_alone, tmp_path / "four", LOSSES)
    one, four = state_of(tokenizer_alone), state_of(tmp_path / "four")
    for part in ("model", "discriminator", "ema"):
        assert one[part].keys() == four[part].keys()
        for name, value in one[part].items():
            if not name.startswith("quantize."):  # of codes drawn to one feature, rounding chooses
                torch.testing.assert_close(four[part][name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_processes_train_the_generator_as_one(tmp_path: Path, parallel: str) -> None:
    run(1, "generator", tmp_path / "tokens", tmp_path / "one", **GENERATOR)
    run(4, "generator", tmp_path / "tokens", tmp_path / "four", **GENERATOR, parallel=parallel)
    same_losses(tmp_path / "one", tmp_path / "four", ("loss", "accuracy", "grad_norm"))
    for name, value in state_of(tmp_path / "one")["model"].items():
        torch.testing.assert_close(state_of(tmp_path / "four")["model"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("begun", "goes_on"), [(("ddp", 2), ("ddp", 1)), (("fsdp", 2), ("ddp", 4)), (("ddp", 1), ("fsdp", 2))]
)
def test_another_number_of_processes_goes_on(photographs, tokenizer_alone, tmp_path, begun, goes_on) -> None:
    """The next batches are those that the run would have read, and so are the losses."""
    out = tmp_path / "run"
    run(begun[1], "tokenizer", photographs, out, **BOTH, parallel=begun[0], leave_in_step=12)
    assert state_of(out)["step"] == 10
    run(goes_on[1], "tokenizer", photographs, out, True, **BOTH, parallel=goes_on[0])
    same_losses(tokenizer_alone, out, LOSSES)


def test_killed_processes_go_on_to_the_last_bit(photographs: Path, tmp_path: Path) -> None:
    """SIGKILL of all of them between two checkpoints, in the adversarial phase."""
    run(2, "tokenizer", photographs, tmp_path / "whole", **BOTH)
    process = start(2, "tokenizer", photographs, tmp_path / "cut", **BOTH, pause=0.2)
    deadline = time.monotonic() + 200
    log = tmp_path / "cut" / "log.jsonl"
    while not (log.exists() and '"step": 12,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", str(tmp_path / "cut")], check=False)
    process.wait()
    assert state_of(tmp_path / "cut")["step"] == 10
    run(2, "tokenizer", photographs, tmp_path / "cut", True, **BOTH)
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    for part in ("model", "discriminator", "ema"):
        assert all(torch.equal(cut[part][name], value) for name, value in whole[part].items()), part


def test_a_second_run_into_the_folder_is_refused(photographs: Path, tmp_path: Path) -> None:
    first = start(1, "tokenizer", photographs, tmp_path / "run", **BOTH, pause=1.0)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "run" / "log.jsonl").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        second = start(2, "tokenizer", photographs, tmp_path / "run", **BOTH)
        output, _ = second.communicate(timeout=100)
        assert second.returncode != 0 and "another process" in output
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def test_figures_of_the_log_are_over_all_processes(tokenizer_alone: Path) -> None:
    entries = log_of(tokenizer_alone)
    assert all(np.isfinite(entry["usage"]) and entry["perplexity"] >= 1 for entry in entries)
