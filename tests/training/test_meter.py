"""The averages of a log window: across a checkpoint, and on the device of the values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from training.conftest import TOKENIZER, TOKENIZER_TRAINING

from alitok_fast.data import open_source
from alitok_fast.training.meter import Meter
from alitok_fast.training.ranks import Ranks
from alitok_fast.training.tokenizer import TokenizerTask, train_tokenizer


def filled() -> Meter:
    meter = Meter()
    meter.add({"loss": torch.tensor(2.0), "mse": torch.tensor(1.0)}, torch.tensor([3, 0, 1, 0]), samples=4)
    return meter


def test_a_window_goes_on_after_loading():
    whole, resumed = filled(), Meter()
    resumed.load(filled().state())
    for meter in (whole, resumed):
        meter.add({"loss": torch.tensor(4.0), "mse": torch.tensor(3.0)}, torch.tensor([0, 2, 0, 0]), samples=4)
    one, two = ({**meter.summary(), "samples_per_second": 0} for meter in (whole, resumed))
    assert one == two and one["loss"] == 3 and one["usage"] == 0.75


def test_what_comes_back_from_the_cpu_goes_to_the_device():
    """A checkpoint is read onto the CPU. Tensors that only pretend to be on a GPU are as strict as real ones."""
    state = filled().state()
    with FakeTensorMode() as fake:
        on_cpu = fake.from_tensor
        state = {**state, "usage": on_cpu(state["usage"]), "sums": {k: on_cpu(v) for k, v in state["sums"].items()}}
        meter = Meter()
        meter.load(state, Ranks(device=torch.device("cuda:0")))
        usage = torch.ones(4, dtype=torch.int64, device="cuda:0")
        meter.add({"mse": torch.ones((), device="cuda:0")}, usage, samples=4)
        after = meter.state()
        tensors = [after["usage"], *after["sums"].values()]
    assert [tensor.device.type for tensor in tensors] == ["cuda"] * 3


class Killed(Exception):
    pass


def test_a_run_resumed_inside_a_window_logs_the_same(device, idx_folder: Path, tmp_path: Path, monkeypatch):
    """Checkpoints after 3, 6, ... steps and entries after 2, 4, ...: the one of step 4 has a part of each half."""
    assert TOKENIZER_TRAINING.save_every % TOKENIZER_TRAINING.log_every
    source, config = open_source(idx_folder, image_size=8), replace(TOKENIZER_TRAINING, steps=6)

    def run(folder: Path, resume: bool = False) -> list[dict]:
        options = dict(device=str(device), resume=resume, progress=False)
        train_tokenizer(source, folder, 1, TOKENIZER, config, **options)
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [
            {key: value for key, value in entry.items() if key not in ("samples_per_second", "waited")}
            for entry in entries
        ]

    whole = run(tmp_path / "whole")
    after_backward, steps = TokenizerTask.after_backward, iter(range(config.steps))

    def killed(task: TokenizerTask, outputs: list) -> None:
        if next(steps) == 3:
            raise Killed
        after_backward(task, outputs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TokenizerTask, "after_backward", killed)
        run(tmp_path / "cut")
    resumed = run(tmp_path / "cut", resume=True)
    assert [entry["step"] for entry in resumed] == [2, 4, 6] and "usage" in resumed[1]
    if device.type == "cpu":
        assert resumed == whole
    else:  # sums of gradients are added up in another order there
        for one, two in zip(resumed, whole, strict=True):
            assert one == pytest.approx(two, rel=1e-2)
