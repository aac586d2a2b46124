"""Losses: equal to the published training's, in float32 under autocast, exact when averaged over ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alitok_fast.config import tokenizer_preset
from alitok_fast.models.discriminator import Discriminator
from alitok_fast.models.tokenizer import aux_target
from alitok_fast.training.losses import (
    MeanLogits,
    adaptive_weight,
    adversarial_loss,
    auxiliary_loss,
    discriminator_loss,
    gradients_at,
    lecam_loss,
    r1_penalty,
    reconstruction_loss,
)

PHASES = {1: (0.1, 1.0, False), 2: (1.0, 0.0, False), 3: (1.0, 0.0, True)}  # logit weight, LPIPS weight, adversarial
TOLERANCE = 1e-5
CONFIG = tokenizer_preset("256")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def outputs(golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "losses.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def pictures(outputs) -> tuple[Tensor, Tensor, Tensor]:
    """Images and reconstructions (3, 3, 256, 256), auxiliary strips (3, 3, 16, 272), in [0, 1]."""
    images, reconstruction = (outputs[name].permute(0, 3, 1, 2).float() / 255 for name in ("photos", "reconstruction"))
    return images, reconstruction, outputs["aux"].float() / 255


@pytest.fixture(scope="module")
def logits(pictures, recipe) -> tuple[Tensor, Tensor]:
    """The discriminator's of images and of reconstructions."""
    model = Discriminator()
    model.load_state_dict(recipe("discriminator"))
    with torch.inference_mode():
        return model(pictures[0]), model(pictures[1])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_published_phases(outputs, pictures, logits, phase: int, stage: int) -> None:
    """The perceptual distances of each picture are given here; tests/training/test_perceptual.py computes them."""
    images, reconstruction, aux = pictures
    real, fake = logits
    logit_weight, lpips_weight, adversarial = PHASES[phase]
    squared = reconstruction_loss(images, reconstruction)
    if stage == 1:
        squared = squared + auxiliary_loss(aux_target(images, CONFIG), aux, CONFIG, weight=10.0)
    perceptual = logit_weight * outputs["perceptual"].mean() + lpips_weight * outputs["lpips"].mean()
    ours = torch.stack([squared, perceptual, adversarial_loss(fake) if adversarial else torch.zeros(())])
    torch.testing.assert_close(ours, outputs[f"phase{phase}_stage{stage}"][[0, 1, 3]], rtol=TOLERANCE, atol=0)

    loss = discriminator_loss(real, fake) if adversarial else torch.zeros(())
    ours = torch.stack([loss, real.mean(), fake.mean()])
    torch.testing.assert_close(ours, outputs[f"phase{phase}_discriminator"], rtol=TOLERANCE, atol=0)


def every_loss(images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
    config = CONFIG
    strips = aux_target(images, config), aux_target(reconstruction, config)
    averages = MeanLogits(torch.tensor(0.2), torch.tensor(-0.1))
    return {
        "mse": reconstruction_loss(images, reconstruction),
        "aux": auxiliary_loss(*strips, config, 10.0),
        "adversarial": adversarial_loss(reconstruction),
        "discriminator": discriminator_loss(images, reconstruction),
        "lecam": lecam_loss(images, reconstruction, averages),
    }


def test_losses_are_float32_under_autocast() -> None:
    images, reconstruction = torch.rand(2, 4, 3, 256, 256)
    exact = every_loss(images, reconstruction)
    with torch.autocast("cpu", torch.bfloat16):
        assert {name: loss.dtype for name, loss in exact.items()} == dict.fromkeys(exact, torch.float32)
        torch.testing.assert_close(every_loss(images, reconstruction), exact, rtol=0, atol=0)
        rounded = every_loss(images.bfloat16(), reconstruction.bfloat16())
    expected = every_loss(images.bfloat16().float(), reconstruction.bfloat16().float())
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0)


def test_means_over_ranks_are_those_of_the_whole_batch() -> None:
    images, reconstruction = torch.randn(2, 4, 3, 256, 256)
    ranks = [every_loss(*parts) for parts in zip(images.split(2), reconstruction.split(2), strict=True)]
    averaged = {name: torch.stack([rank[name] for rank in ranks]).mean() for name in ranks[0]}
    torch.testing.assert_close(averaged, every_loss(images, reconstruction), rtol=1e-6, atol=1e-7)


def test_hinge_is_flat_where_the_discriminator_is_sure() -> None:
    real, fake = torch.tensor([2.0, 0.5], requires_grad=True), torch.tensor([-3.0, 0.0], requires_grad=True)
    loss = discriminator_loss(real, fake, factor=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.5 / 2 + 1 / 2))
    assert real.grad.tolist() == [0, -0.25] and fake.grad.tolist() == [0, 0.25]


def test_lecam_holds_logits_near_the_averages() -> None:
    averages = MeanLogits(torch.tensor(1.0), torch.tensor(-1.0))
    assert lecam_loss(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 3.0]), averages).item() == 0
    loss = lecam_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, -1.0]), averages)
    assert loss.item() == pytest.approx((1 + 4) / 2 + (1 + 4) / 2)
    # of a batch's mean logits, as 1d-tokenizer has it
    assert lecam_loss(torch.tensor(0.5), torch.tensor(-0.5), averages).item() == pytest.approx(1.5**2 + 1.5**2)


def test_mean_logits_move_by_their_decay() -> None:
    averages = MeanLogits.zeros().updated(torch.tensor(1.0), torch.tensor(-2.0), decay=0.9)
    averages = averages.updated(torch.tensor(1.0), torch.tensor(-2.0), decay=0.9)
    torch.testing.assert_close(averages, MeanLogits(torch.tensor(0.19), torch.tensor(-0.38)))


def test_r1_is_half_the_squared_gradient() -> None:
    images = torch.randn(3, 2, 4, 4, requires_grad=True)
    filters = torch.randn(5, 2, 4, 4, requires_grad=True)
    penalty = r1_penalty(F.conv2d(images, filters), images)  # linear: each image's gradient is the filters' sum
    expected = filters.sum(0).square().sum() / 2
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, filters)[0] for value in (penalty, expected)))
    with pytest.raises(ValueError, match="images: expected a tensor that requires gradients"):
        r1_penalty(F.conv2d(images.detach(), filters), images.detach())


def test_r1_differentiates_the_discriminator_twice() -> None:
    torch.manual_seed(0)
    model = Discriminator(channels=32, stages=1).double()
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    weight = model.to_logits[0].weight
    r1_penalty(model(images), images).backward()
    slope, step = weight.grad[0, 0].item(), 1e-3

    def moved(by: float) -> float:
        with torch.no_grad():
            weight[0, 0] += by
        penalty = r1_penalty(model(images), images).item()
        with torch.no_grad():
            weight[0, 0] -= by
        return penalty

    assert slope != 0 and (moved(step) - moved(-step)) / (2 * step) == pytest.approx(slope, rel=0.05)


def test_adaptive_weight_balances_the_gradients() -> None:
    layer = torch.randn(3, 4, requires_grad=True)
    x = torch.randn(2, 3)
    reconstruction, adversarial = (x @ layer).square().mean(), -(x @ layer).mean()
    gradients = gradients_at(layer, reconstruction, adversarial)
    weight = adaptive_weight(*gradients)
    (reconstruction + weight * adversarial).backward()  # the graph is still there
    torch.testing.assert_close(layer.grad, gradients[0] + weight * gradients[1])
    assert weight.item() == pytest.approx((gradients[0].norm() / (gradients[1].norm() + 1e-4)).item())
    assert not weight.requires_grad
    assert adaptive_weight(gradients[0], torch.zeros(3, 4), largest=10.0).item() == 10
    assert adaptive_weight(torch.zeros(3, 4), gradients[1]).item() == 0
