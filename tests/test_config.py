"""Configurations: derived sizes, presets, refused values."""

from __future__ import annotations

import dataclasses

import pytest

from alitok_fast.config import (
    GENERATORS,
    TOKENIZERS,
    GeneratorConfig,
    TokenizerConfig,
    generator_preset,
    tokenizer_preset,
)


@pytest.mark.parametrize(
    "name, grid, prefix, tokens",
    [("256", 16, 17, 273), ("512", 32, 33, 1057), ("demo", 8, 9, 73), ("photos-64", 16, 17, 273)],
)
def test_lengths_derive_from_the_image(name, grid, prefix, tokens):
    config = tokenizer_preset(name)
    assert (config.grid, config.num_prefix_tokens, config.num_tokens) == (grid, prefix, tokens)


@pytest.mark.parametrize(
    "name, head_dim, hidden, scale, power",
    [("b", 48, 2048, 16.0, 1.8), ("l", 64, 2816, 6.0, 0.7), ("xl", 80, 3584, 13.0, 1.4)],
)
def test_published_generators(name, head_dim, hidden, scale, power):
    config = generator_preset(name)
    assert (config.head_dim, config.hidden, config.num_tokens) == (head_dim, hidden, 273)
    assert (config.guidance_scale, config.guidance_power) == (scale, power)
    assert (config.vocabulary, config.first_class, config.no_condition) == (5098, 4097, 5097)


@pytest.mark.parametrize("config", [*TOKENIZERS.values(), *GENERATORS.values()])
def test_round_trip_through_a_dictionary(config):
    assert type(config).from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", ["demo", "photos-64"])
def test_a_generator_fits_the_tokenizer_of_its_name(name):
    tokenizer, generator = tokenizer_preset(name), generator_preset(name)
    assert (tokenizer.grid, tokenizer.codebook_size) == (generator.grid, generator.codebook_size)


def test_unknown_key_raises():
    with pytest.raises(ValueError, match="GeneratorConfig: unknown key 'depth'; expected one of .*'num_layers'"):
        GeneratorConfig.from_dict({"width": 64, "depth": 3})


def test_an_unknown_key_is_shown_escaped_and_shortened():
    with pytest.raises(ValueError) as caught:
        GeneratorConfig.from_dict({"\x1b]0;owned\x07" + "x" * 9999: 3})
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 500


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="expected a generator preset out of .*'xl'.*, got 'xxl'"):
        generator_preset("xxl")
    with pytest.raises(ValueError, match="expected a tokenizer preset out of .*'256'.*, got '128'"):
        tokenizer_preset("128")


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (TokenizerConfig, {"image_size": 250}, "image_size: expected a multiple of patch_size 16, got 250"),
        (TokenizerConfig, {"stage": 3}, "stage: expected 1 or 2, got 3"),
        (TokenizerConfig, {"encoder_width": 770}, "encoder_width: expected a multiple of encoder_heads 12, got 770"),
        (TokenizerConfig, {"codebook_size": 0}, "codebook_size: expected a positive integer, got 0"),
        (TokenizerConfig, {"code_dim": 1.5}, "code_dim: expected a positive integer, got 1.5"),
        (GeneratorConfig, {"width": 770}, "width: expected a multiple of num_heads 16, got 770"),
        (GeneratorConfig, {"width": 96}, "width: expected a head dimension that is a multiple of 4"),
        (GeneratorConfig, {"num_layers": -1}, "num_layers: expected a positive integer, got -1"),
        (GeneratorConfig, {"num_layers": True}, "num_layers: expected a positive integer, got True"),
        (GeneratorConfig, {"num_layers": 10**9}, "num_layers: expected at most 1024, got 1000000000"),
        (GeneratorConfig, {"grid": 2500}, "grid: expected at most 256, got 2500"),
        (GeneratorConfig, {"width": 2**63}, "width: expected at most 131072, got 9223372036854775808"),
        (GeneratorConfig, {"guidance_scale": float("nan")}, "guidance_scale: expected a finite number .*, got nan"),
        (GeneratorConfig, {"guidance_scale": 1e39}, r"guidance_scale: expected a finite number .*, got 1e\+39"),
        (GeneratorConfig, {"guidance_scale": -1}, "guidance_scale: expected a number >= 0, got -1"),
        (GeneratorConfig, {"guidance_power": 0.0}, "guidance_power: expected a number > 0, got 0.0"),
        (GeneratorConfig, {"guidance_power": "x"}, "guidance_power: expected a finite number .*, got 'x'"),
        (GeneratorConfig, {"dropout": None}, "dropout: expected a finite number .*, got None"),
        (GeneratorConfig, {"dropout": "\x1b[31m" + "x" * 999}, r"got '\\x1b\[31mx+\.\.\.x+'$"),
        (TokenizerConfig, {"usage_decay": 1.0}, r"usage_decay: expected a number in \[0, 1\), got 1.0"),
        (TokenizerConfig, {"image_size": 16000, "patch_size": 16}, "image_size: expected at most 4096"),
        (GeneratorConfig, {"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_values_raise(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        generator_preset("b").width = 1
