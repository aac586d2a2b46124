"""SamplingParams: ranges, types, the model's own guidance, single settings exchanged."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from alitok_fast import SamplingParams
from alitok_fast.inference.params import sampling_params


def test_the_model_s_guidance_where_none_is_given(tiny_generator):
    config = tiny_generator().config
    given = SamplingParams(guidance_scale=0, seed=5).resolved(config)
    assert (given.guidance_scale, given.guidance_power, given.seed) == (0.0, config.guidance_power, 5)
    assert not given.guided and SamplingParams().resolved(config).guided
    assert SamplingParams().resolved(config).guidance_scale == config.guidance_scale


def test_values_become_plain_numbers():
    params = SamplingParams(np.float32(2.5), torch.tensor(2), np.float64(1), np.int64(3), 1, torch.tensor(7))
    assert params.to_dict() == {
        "guidance_scale": 2.5, "guidance_power": 2.0, "temperature": 1.0, "top_k": 3, "top_p": 1.0, "seed": 7,
    }  # fmt: skip
    assert {type(value) for value in params.to_dict().values()} == {float, int}


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().seed = 3


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("guidance_scale", 1e39, ValueError, "guidance_scale: expected a number in [0, 1e+30], got 1e+39"),
        ("guidance_scale", "3", TypeError, "guidance_scale: expected a number, got '3'"),
        ("guidance_power", 0, ValueError, "guidance_power: expected a number in (0, 1e+30], got 0"),
        ("temperature", None, TypeError, "temperature: expected a number, got None"),
        ("temperature", 1e-40, ValueError, "temperature: expected 0 or a number in [1e-30, 1e+30], got 1e-40"),
        ("temperature", float("inf"), ValueError, "temperature: expected a finite number, got inf"),
        ("top_k", 2**63, ValueError, "top_k: expected None or an integer in [1, 2**63), got 9223372036854775808"),
        ("top_k", 2.0, TypeError, "top_k: expected an integer, got 2.0"),
        ("top_k", True, TypeError, "top_k: expected an integer, got True"),
        ("top_p", 0, ValueError, "top_p: expected None or a number in (0, 1], got 0.0"),
        ("seed", 2**63, ValueError, "seed: expected an integer in [-2**63, 2**63), got 9223372036854775808"),
        ("seed", None, TypeError, "seed: expected an integer, got None"),
    ],
)
def test_mistakes_are_named(name, value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SamplingParams(**{name: value})


def test_single_settings_are_exchanged():
    given = SamplingParams(seed=3, top_k=5)
    assert sampling_params(given, {"seed": 4}) == SamplingParams(seed=4, top_k=5)
    assert sampling_params(None, {}) == SamplingParams()
    with pytest.raises(TypeError, match="sede: expected one of the settings guidance_scale, .*, seed"):
        sampling_params(None, {"sede": 4})
    with pytest.raises(TypeError, match="params: expected SamplingParams or None, got dict"):
        sampling_params({"seed": 3}, {})
