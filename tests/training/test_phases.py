"""Phases: where a step lies in them, its learning rate, whose turn it is; the plateau that lowers the rate."""

from __future__ import annotations

import pytest

from alitok_fast.training.config import TOKENIZER_PRESETS, TokenizerTrainConfig
from alitok_fast.training.phases import Phase, Plateau, Schedule

GAN = (Phase(4, 1e-3, perceptual=1.0), Phase(6, 1e-3, 1e-4, adversarial=0.05))


def test_turns_alternate_where_there_is_an_adversary() -> None:
    schedule = Schedule(GAN, 10, 0)
    turns = [schedule.at(step).turn for step in range(10)]
    assert turns == ["model"] * 4 + ["model", "discriminator"] * 3
    assert [schedule.at(step).number for step in range(10)] == [0] * 4 + [1] * 6


def test_each_phase_has_its_own_cosine() -> None:
    schedule = Schedule(GAN, 10, 2)
    assert [schedule.lr(step) for step in (0, 1, 2, 3, 4)] == [0, 5e-4, 1e-3, 1e-3, 1e-3]
    assert schedule.lr(7) == pytest.approx((1e-3 + 1e-4) / 2)
    assert schedule.lr(10) == schedule.lr(99) == pytest.approx(1e-4)


@pytest.mark.parametrize(("steps", "lengths"), [(3, [3]), (4, [4]), (5, [4, 1]), (10, [4, 6]), (30, [4, 26])])
def test_fewer_steps_cut_phases_and_more_extend_the_last(steps: int, lengths: list[int]) -> None:
    assert [phase.steps for phase in Schedule(GAN, steps, 0).phases] == lengths


def test_the_published_phases() -> None:
    for stage, steps in ((1, [50_000, 200_000, 100_000]), (2, [50_000, 150_000, 100_000])):
        config = TOKENIZER_PRESETS[stage]["256"]
        assert [phase.steps for phase in config.phases] == steps and config.steps == sum(steps)
        weights = [(phase.perceptual, phase.lpips, phase.adversarial) for phase in config.phases]
        assert weights == [(0.1, 1.0, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.05)]
        assert [(phase.lr, phase.last_lr) for phase in config.phases] == [(1e-4, 1e-4), (1e-4, 2e-5), (2e-5, 2e-6)]


def test_phases_give_the_steps_and_survive_json() -> None:
    config = TokenizerTrainConfig.from_dict({"warmup": 0, "phases": [{"steps": 4, "lr": 1e-3}, GAN[1].to_dict()]})
    assert config.steps == 10 and config.phases[0] == Phase(4, 1e-3)
    assert TokenizerTrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "phase.steps: expected a whole number of at least 1, got 0"),
        ({"steps": True}, "phase.steps"),
        ({"lr": 0.0}, "phase.lr: expected a positive number, got 0.0"),
        ({"lr": float("nan")}, "phase.lr: expected 0 or a positive number, got nan"),
        ({"end_lr": 1.0}, "phase.end_lr: expected 0 to lr"),
        ({"adversarial": -1.0}, "phase.adversarial: expected 0 or a positive number, got -1.0"),
        ({"lpips": "1"}, "phase.lpips: expected 0 or a positive number, got '1'"),
    ],
)
def test_bad_phases(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase(**{"steps": 1, "lr": 1e-3, **changes})
    with pytest.raises(ValueError, match="Phase: unknown key 'step'"):
        Phase.from_dict({"step": 1, "lr": 1e-3})


def test_a_plateau_lowers_the_rate_and_a_phase_begins_anew() -> None:
    plateau = Plateau(patience=20, factor=0.5)
    for loss in (1.0, 0.9, 0.9, 0.9):
        plateau.see(loss, 10)
    assert plateau.scale == 0.5
    plateau.see(0.5, 10)
    plateau.see(0.5, 10)
    assert plateau.scale == 0.5
    other = Plateau(patience=20, factor=0.5)
    other.load(plateau.state())
    other.see(0.5, 10)
    assert other.scale == 0.25
    other.enter(1)
    assert (other.scale, other.since) == (1.0, 0)


def test_without_patience_nothing_is_lowered() -> None:
    plateau = Plateau(patience=0, factor=0.5)
    for _ in range(100):
        plateau.see(1.0, 10)
    assert plateau.scale == 1.0
