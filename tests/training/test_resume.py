"""A run killed with SIGKILL and resumed ends with the same bits as one that was left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from alitok_fast.data import open_source

TESTS = Path(__file__).resolve().parents[1]

# The killed process: trains with short pauses, so that the kill hits the middle of it.
_SCRIPT = """
import sys, time, torch
kind, data, out, pause, resume = sys.argv[1:]
torch.set_num_threads(1)
from training.conftest import GENERATOR, GENERATOR_TRAINING, TOKENIZER, TOKENIZER_TRAINING
from alitok_fast.data import open_source, validate_token_cache
from alitok_fast.training.generator import GeneratorTask, train_generator
from alitok_fast.training.tokenizer import TokenizerTask, train_tokenizer
for task in (GeneratorTask, TokenizerTask):
    after = task.after_backward
    task.after_backward = lambda self, outputs, after=after: (time.sleep(float(pause)), after(self, outputs))
options = dict(resume=resume == "1", progress=False)
if kind == "generator":
    train_generator(validate_token_cache(data), out, GENERATOR, GENERATOR_TRAINING, **options)
else:
    train_tokenizer(open_source(data, image_size=8), out, 1, TOKENIZER, TOKENIZER_TRAINING, **options)
"""


def start(kind: str, data: Path, out: Path, pause: float, resume: bool) -> subprocess.Popen:
    arguments = [kind, str(data), str(out), str(pause), str(int(resume))]
    paths = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n"
    return subprocess.Popen([sys.executable, "-c", paths + _SCRIPT, *arguments], cwd=TESTS.parent)


def wait_for_step(log: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hung before it was killed"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_killed_and_resumed_equals_uninterrupted(kind: str, idx_folder: Path, tmp_path: Path) -> None:
    data = idx_folder if kind == "tokenizer" else token_cache(idx_folder, tmp_path / "tokens")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(kind, data, whole, 0, False)
    process = start(kind, data, killed, 0.1, False)
    wait_for_step(killed / "log.jsonl", 8, process)  # the checkpoint is of step 6: work after it is lost and redone
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = torch.load(killed / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert before == 6
    assert start(kind, data, killed, 0, True).wait(300) == 0
    assert uninterrupted.wait(300) == 0

    expected, actual = (torch.load(run / "checkpoint" / "state.pt", weights_only=True) for run in (whole, killed))
    assert actual["step"] == expected["step"] == 12
    assert torch.equal(actual["rng"][0]["cpu"], expected["rng"][0]["cpu"])
    for name, value in expected["model"].items():
        assert torch.equal(actual["model"][name], value), name
    for name, moments in expected["optimizer"]["model"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(actual["optimizer"]["model"]["state"][name][key], value), (name, key)
    assert steady(whole) == steady(killed)
    one, two = (run / "model" / "model.safetensors" for run in (whole, killed))
    assert one.read_bytes() == two.read_bytes()


def steady(run: Path) -> list[dict]:
    """The log without its timing."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in entry.items() if key not in ("samples_per_second", "waited")} for entry in entries
    ]


def token_cache(idx_folder: Path, folder: Path) -> Path:
    from training.conftest import TOKENIZER

    from alitok_fast.models.tokenizer import Tokenizer
    from alitok_fast.training.tokenize import tokenize

    torch.manual_seed(0)
    tokenize(Tokenizer(TOKENIZER), open_source(idx_folder, image_size=8), folder, crops=2, progress=False)
    return folder
