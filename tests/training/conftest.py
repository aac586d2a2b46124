"""Tiny models, data and settings: a training step takes milliseconds."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision_here import import_or_skip

from alitok_fast.config import GeneratorConfig, TokenizerConfig
from alitok_fast.data.loader import stack
from alitok_fast.models.perceptual import logit_distance, lpips_distance
from alitok_fast.training.config import GeneratorTrainConfig, TokenizerTrainConfig

TOKENIZER = TokenizerConfig(
    image_size=8, patch_size=4, codebook_size=16, code_dim=8, encoder_width=16, encoder_layers=1, encoder_heads=2,
    decoder_width=16, decoder_layers=1, decoder_heads=2, num_buffer_tokens=2, stage=1,
)  # fmt: skip
GENERATOR = GeneratorConfig(
    width=16,
    num_layers=2,
    num_heads=2,
    grid=2,
    codebook_size=16,
    num_classes=3,
    hidden_multiple=8,
    dropout=0.1,
    class_dropout=0.5,
)
_COMMON = dict(batch_size=4, warmup=2, precision="fp32", log_every=2, save_every=3)
TOKENIZER_TRAINING = TokenizerTrainConfig(steps=12, lr=1e-2, **_COMMON)
GENERATOR_TRAINING = GeneratorTrainConfig(steps=12, lr=1e-2, **_COMMON)


FIRST = TOKENIZER_TRAINING.schedule.at(0)  # where the first step lies


def batch_of(task, index: int) -> tuple[torch.Tensor, ...]:
    """Micro-batch `index` of a task, as the loop hands it over."""
    return stack([task.read(*at) for at in task.order().at(index)])


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("stripes"))


def write_stripes(folder: Path) -> Path:
    """24 images of 8x8 in three classes: dark with vertical, grey with horizontal, bright with diagonal stripes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:8, :8]
    labels = np.arange(24, dtype=np.uint8) % 3
    waves = [label / 2 + rng.uniform(0.1, 0.3) * np.sin([x, y, x + y][label] * 1.5) for label in labels]
    images = np.clip(np.stack(waves) * 255, 0, 255).astype(np.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 24) + labels.tobytes())
    return folder


@pytest.fixture(scope="session")
def convnext_file(recipe, tmp_path_factory) -> Path:
    """The golden weights, as torchvision's file holds its own."""
    import_or_skip("torchvision")
    path = tmp_path_factory.mktemp("convnext") / "convnext_small-0c510722.pth"
    torch.save(recipe("convnext_small"), path)
    return path


@pytest.fixture(scope="session")
def convnext(convnext_file) -> nn.Module:
    return logit_distance("convnext_small", convnext_file)


@pytest.fixture(scope="session")
def vgg_file(recipe, tmp_path_factory) -> Path:
    """The golden trunk under torchvision's names; its classifier is not needed."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    trunk = {name.split(".", 2)[2]: value for name, value in recipe("lpips_vgg").items() if name.startswith("net.")}
    save_file({f"features.{name}": value for name, value in trunk.items()}, path)
    return path


@pytest.fixture(scope="session")
def lpips(recipe, vgg_file) -> nn.Module:
    import_or_skip("lpips")
    distance = lpips_distance("vgg", vgg_file)
    heads = {name: value for name, value in recipe("lpips_vgg").items() if name.startswith("lin")}
    found = distance.network.load_state_dict(heads, strict=False)
    assert not found.unexpected_keys
    return distance
