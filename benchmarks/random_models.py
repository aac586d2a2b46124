"""Models of the released sizes, with random weights: nothing that is timed here depends on what they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from alitok_fast.config import TOKENIZERS, generator_preset
from alitok_fast.models import Generator, Tokenizer


def random_generator(preset: str, device: torch.device, **changes: Any) -> Generator:
    """In float32 and evaluation mode; `changes` replace fields of the preset's configuration."""
    torch.manual_seed(0)
    config = dataclasses.replace(generator_preset(preset), **changes)
    gen = Generator(config, device).eval().requires_grad_(False)
    for parameter in gen.parameters():  # the output layer starts at zero
        if parameter.ndim == 2:
            parameter.uniform_(-1, 1).mul_((3 / parameter.shape[1]) ** 0.5)
    return gen


def random_tokenizer(device: torch.device, **changes: Any) -> Tokenizer:
    """Stage 2 at 256 x 256, in float32 and evaluation mode; `changes` as for `random_generator`."""
    torch.manual_seed(0)
    config = dataclasses.replace(TOKENIZERS["256"], **changes)
    return Tokenizer(config, device).eval().requires_grad_(False)
