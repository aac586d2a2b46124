"""Discriminator: parity with the reference implementation, gradients reach the images."""

from __future__ import annotations

import numpy as np
import torch

from alitok_fast.models.discriminator import BlurDownsample, Discriminator
from alitok_fast.testing import relative_error


def test_logits_match_reference(golden, recipe):
    model = Discriminator()
    model.load_state_dict(recipe("discriminator"))
    with np.load(golden / "discriminator.npz") as outputs:
        photos = torch.from_numpy(outputs["photos"]).permute(0, 3, 1, 2).float() / 255
        expected = outputs["logits"]
    with torch.inference_mode():
        assert relative_error(model(photos), expected) < 1e-4


def test_blur_keeps_a_constant_and_halves_the_size():
    x = torch.full((1, 2, 16, 12), 3.0)
    y = BlurDownsample()(x)
    assert y.shape == (1, 2, 8, 6)
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], torch.full((1, 2, 6, 4), 3.0))


def test_gradient_reaches_the_images():
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    Discriminator(channels=32).forward(images).mean().backward()
    assert images.grad.abs().max() > 0
