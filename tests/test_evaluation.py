"""PSNR, codebook measures and the classifier."""

from __future__ import annotations

import math

import pytest
import torch

from alitok_fast.evaluation.classifier import predict, train_classifier
from alitok_fast.evaluation.codebook import codebook_perplexity, codebook_usage
from alitok_fast.evaluation.psnr import psnr


def test_psnr_of_a_known_error() -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    values = psnr(images, images + torch.tensor([0.1, 0.0])[:, None, None, None])
    assert values[0].item() == pytest.approx(20.0, abs=1e-4) and values[1].item() == math.inf
    with pytest.raises(ValueError, match=r"reconstruction: expected shape \(2, 3, 4, 4\)"):
        psnr(images, images[:1])


def test_codebook_measures() -> None:
    assert codebook_usage(torch.tensor([0, 3, 0, 1])) == 0.5
    assert codebook_perplexity(torch.tensor([7, 7, 7, 0])) == pytest.approx(3.0)
    assert codebook_perplexity(torch.tensor([0, 9])) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="counts: expected at least one"):
        codebook_perplexity(torch.zeros(3))


def test_classifier_learns_a_simple_task() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (256,), generator=rng)
    images = torch.randint(0, 60, (256, 3, 16, 16), generator=rng, dtype=torch.uint8)
    for i, label in enumerate(labels):  # mirror images keep the class: bright above, or bright below
        images[i, :, 8 * int(label) : 8 * int(label) + 8] += 150
    model = train_classifier(images[:192], labels[:192], 2, epochs=4, batch=32)
    assert (predict(model, images[192:]) == labels[192:]).double().mean() > 0.95
    with pytest.raises(TypeError, match="images: expected uint8, got torch.float32"):
        train_classifier(images.float(), labels, 2)
