"""Gradients of the whole loss, for models of the released sizes, equal the reference implementation's."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alitok_fast.models.discriminator import Discriminator
from alitok_fast.models.loading import build
from alitok_fast.models.tokenizer import aux_target
from alitok_fast.storage.checkpoint import Checkpoint, recognise
from alitok_fast.training.losses import adversarial_loss, auxiliary_loss, generator_loss, reconstruction_loss

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4


def released_size(recipe, name: str) -> nn.Module:
    """In evaluation mode: no dropout, no clustering."""
    state = recipe(name)
    return build(Checkpoint(recognise(state), state)).eval()


def golden_gradients(golden: Path, name: str) -> tuple[list[float], dict[str, tuple[float, float]]]:
    """The numbers in its description, and [norm, sum(gradient * probe)] of each parameter."""
    saved = json.loads((golden / f"gradients_{name}.json").read_text())
    numbers = re.findall(r"\d+\.\d[\de-]*", saved["what"].partition("loss")[2])
    return [float(number) for number in numbers], saved["norm_and_probe"]


def assert_gradients(model: nn.Module, expected: dict[str, tuple[float, float]], probe) -> None:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(trained) == set(expected)
    wrong = {}
    for name, parameter in trained.items():
        gradient, (norm, projected) = parameter.grad.double(), expected[name]
        ours = float(gradient.norm()), float((gradient * probe(name, tuple(gradient.shape))).sum())
        if not (abs(ours[0] - norm) <= TOLERANCE * norm and abs(ours[1] - projected) <= TOLERANCE * norm):
            wrong[name] = (ours, (norm, projected))
    assert wrong == {}


@pytest.fixture
def probe(golden: Path, recipe_module):
    return lambda name, shape: torch.from_numpy(recipe_module.tensor("probe." + name, shape, 0)).double()


def first_photo(golden: Path) -> Tensor:
    with np.load(golden / "tokenizer.npz") as outputs:
        return torch.from_numpy(outputs["photos"][:1]).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("name, stage", [("tokenizer_stage1", 1), ("tokenizer", 2)])
def test_tokenizer(golden, recipe, probe, convnext, lpips, name: str, stage: int) -> None:
    parts, expected = golden_gradients(golden, f"stage{stage}")
    model, images = released_size(recipe, name), first_photo(golden)
    if stage == 2:  # as stage2_from_stage1 freezes them
        model.requires_grad_(False).decoder.requires_grad_(True)
    discriminator = Discriminator().requires_grad_(False)
    discriminator.load_state_dict(recipe("discriminator"))

    out = model(images)
    squared = reconstruction_loss(images, out.reconstruction)
    if stage == 1:
        squared = squared + auxiliary_loss(aux_target(images, model.config), out.aux, model.config, weight=10.0)
    perceptual = convnext(images, out.reconstruction).mean() + 0.5 * lpips(images, out.reconstruction).mean()
    losses = torch.stack([squared, perceptual, out.vq.loss, adversarial_loss(discriminator(out.reconstruction))])
    torch.testing.assert_close(losses, torch.tensor(parts), rtol=TOLERANCE, atol=0)
    (losses.sum() if stage == 1 else losses[[0, 1, 3]].sum()).backward()
    assert_gradients(model, expected, probe)


def test_generator(golden, recipe, probe) -> None:
    (loss, _), expected = golden_gradients(golden, "ar_b")
    with np.load(golden / "ar_b.npz") as outputs:
        tokens, labels = (torch.from_numpy(outputs[name]).long() for name in ("tokens", "labels"))
    model = released_size(recipe, "ar_b")
    ours = generator_loss(model(tokens, labels), tokens)
    assert math.isclose(ours.item(), loss, rel_tol=TOLERANCE)
    ours.backward()
    assert_gradients(model, expected, probe)
