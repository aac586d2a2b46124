"""Training settings: checks and unknown keys."""

from __future__ import annotations

import pytest

from alitok_fast.config import GENERATORS, TOKENIZERS
from alitok_fast.training.config import GENERATOR_PRESETS, TOKENIZER_PRESETS, GeneratorTrainConfig, TokenizerTrainConfig
from alitok_fast.training.run_config import combine
from alitok_fast.training.run_layers import preset_layer, set_layer


def with_settings(settings: list[str]) -> GeneratorTrainConfig:
    """The generator's settings with those of `--set`; "b" has the defaults."""
    training = combine(
        "generator", [preset_layer("generator", {"training": "b"}), set_layer("generator", settings)]
    ).training
    assert isinstance(training, GeneratorTrainConfig)
    return training


def test_round_trip_and_unknown_key() -> None:
    config = TokenizerTrainConfig(steps=20_000, lr=3e-4)
    assert TokenizerTrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="GeneratorTrainConfig: unknown key 'adaptive_adversarial'"):
        GeneratorTrainConfig.from_dict(config.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 10, "grad_accumulation": 3}, "batch_size: expected a multiple of grad_accumulation 3, got 10"),
        ({"warmup": -1}, "warmup: expected 0 to steps"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"end_lr": 1.0}, "end_lr: expected 0 to lr"),
        ({"precision": "fp8"}, "precision: expected one of"),
        ({"ema_decay": 1.0}, "ema_decay: expected 0 to 1"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratorTrainConfig(**changes)


def test_settings_from_the_command_line() -> None:
    config = with_settings(["steps=70000", "lr=1e-3", "betas=[0.8, 0.9]", "precision=fp32"])
    assert (config.steps, config.lr, config.betas, config.precision) == (70_000, 1e-3, (0.8, 0.9), "fp32")
    wrong = [
        ("steps", "name=value"),
        ("stepz=1", "unknown setting 'stepz'"),
        ("steps=x", "--set steps: expected a whole number such as 500000"),
    ]
    for text, message in wrong:
        with pytest.raises(ValueError, match=message):
            with_settings([text])


def test_every_model_preset_has_training_settings() -> None:
    assert set(GENERATOR_PRESETS) == set(GENERATORS)
    assert set(TOKENIZER_PRESETS[1]) == set(TOKENIZER_PRESETS[2]) == set(TOKENIZERS)


@pytest.mark.parametrize("text", ["[0.9, 0.95]", "(0.9, 0.95)", "0.9,0.95", " 0.9 , 0.95 "])
def test_forms_of_betas(text: str) -> None:
    assert with_settings([f"betas={text}"]).betas == (0.9, 0.95)


@pytest.mark.parametrize(
    "setting",
    ["betas=[0.9]", "betas={}", "betas=", "betas=0.9,0.95,0.99", "betas=1.5,2", "betas=nan,0.9", "weight_decay=-1",
     "weight_decay=nan", "lr=inf", "lr=nan", "end_lr=nan", "max_grad_norm=inf", "ema_decay=nan", "seed=-1", "steps=1.5",
     "batch_size=-2", "grad_accumulation=0", "log_every=0", "save_every=-1"],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused_by_name(setting: str) -> None:
    with pytest.raises(ValueError, match=setting.partition("=")[0]):
        with_settings([setting])


def test_the_form_in_a_message_is_accepted() -> None:
    with pytest.raises(ValueError, match="such as (.*), got") as error:
        with_settings(["betas=x"])
    shown = str(error.value).partition("such as ")[2].partition(", got")[0]
    assert with_settings([f"betas={shown}"]).betas == GeneratorTrainConfig().betas


@pytest.mark.parametrize("changes", [{"steps": 10.0}, {"seed": True}, {"lr": "1"}, {"betas": [0.9, 0.95]}])
def test_types_are_checked(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
        GeneratorTrainConfig(warmup=0, **changes)
