"""Parameter groups and learning-rate schedule against the reference's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from alitok_fast.config import GENERATORS, TOKENIZERS
from alitok_fast.models.generator import Generator
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.training.optim import parameter_groups
from alitok_fast.training.phases import Phase, Schedule


def test_optimizer_groups_match_the_reference(golden) -> None:
    with torch.device("meta"):
        model = Generator(GENERATORS["b"])
    groups = parameter_groups(model, 0.03)
    expected = json.loads((golden / "optimizer_groups.json").read_text())
    assert [(g["weight_decay"], g["names"]) for g in groups] == [(g["weight_decay"], g["params"]) for g in expected]


def test_learning_rate_matches_the_reference(golden) -> None:
    data = np.load(golden / "lr_schedule.npz")
    lr, end_lr, warmup, total = (float(data[key]) for key in ("base_lr", "end_lr", "warmup", "total"))
    schedule = Schedule([Phase(int(total), lr, end_lr)], int(total), int(warmup))
    ours = [schedule.lr(int(step)) for step in data["steps"]]
    np.testing.assert_allclose(ours, data["lr"], rtol=1e-8)


@pytest.mark.parametrize(
    ("step", "warmup", "expected"), [(0, 0, 1.0), (5, 0, 0.55), (10, 0, 0.1), (99, 0, 0.1), (1, 4, 0.25), (10, 10, 0.1)]
)
def test_learning_rate_edges(step: int, warmup: int, expected: float) -> None:
    schedule = Schedule([Phase(10, 1.0, 0.1)], 10, warmup)
    assert schedule.lr(step) == pytest.approx(expected if warmup < 10 else 1.0)


def test_tokenizer_groups() -> None:
    model = Tokenizer(TOKENIZERS["demo"])
    model.encoder.requires_grad_(False)
    plain, decayed = parameter_groups(model, 0.1)
    assert "quantize.embedding.weight" in plain["names"] and "latent_tokens" in plain["names"]
    assert all(p.ndim >= 2 for p in decayed["params"]) and "decoder.decoder_embed.weight" in decayed["names"]
    names = plain["names"] + decayed["names"]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert not any(name.startswith("encoder") for name in names)
