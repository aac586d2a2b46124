"""PSNR, codebook measures and the classifier."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from alitok_fast import PackedGenerator, load_generator, load_tokenizer
from alitok_fast.data import open_source
from alitok_fast.data.transforms import centre_crop
from alitok_fast.evaluation.classifier import features, predict, train_classifier
from alitok_fast.evaluation.codebook import codebook_perplexity, codebook_usage
from alitok_fast.evaluation.demo import drawn_of_each_class, without
from alitok_fast.evaluation.judge import evaluate_samples, evaluate_tokenizer, generate_samples
from alitok_fast.evaluation.psnr import psnr
from alitok_fast.inference.image_decoder import ImageDecoder

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


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
    model = train_classifier(images[:192], labels[:192], 2, epochs=4, batch_size=32)
    assert (predict(model, images[192:]) == labels[192:]).double().mean() > 0.95
    with pytest.raises(TypeError, match="images: expected uint8, got torch.float32"):
        train_classifier(images.float(), labels, 2)


def test_tokenizer_and_samples_are_measured() -> None:
    """On a tokenizer and a generator with fresh weights: figures equal those from the public calls."""
    from alitok_fast.config import GeneratorConfig, TokenizerConfig
    from alitok_fast.inference.sampler import sample
    from alitok_fast.models.generator import Generator
    from alitok_fast.models.tokenizer import Tokenizer

    torch.manual_seed(0)
    encoder = dict(encoder_width=16, encoder_layers=1, encoder_heads=2)
    decoder = dict(decoder_width=16, decoder_layers=1, decoder_heads=2)
    config = TokenizerConfig(image_size=8, patch_size=4, codebook_size=16, code_dim=8, **encoder, **decoder)
    tokenizer = Tokenizer(config).eval()
    generator = Generator(
        GeneratorConfig(width=16, num_layers=1, num_heads=2, grid=2, codebook_size=16, num_classes=3, hidden_multiple=8)
    ).eval()
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    result = evaluate_tokenizer(tokenizer, images, batch_size=2)
    tokens = tokenizer.encode(images / 255)
    scores = psnr(images / 255, tokenizer.decode(tokens))
    assert result["psnr"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert result["codebook_usage"] == len(tokens.unique()) / 16

    drawn, labels = generate_samples(generator, tokenizer.decode, per_class=2, seed=3, batch_size=4)
    assert drawn.shape == (6, 3, 8, 8) and labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.allclose(drawn, tokenizer.decode(sample(generator, labels, seed=3)), atol=1e-5)


def test_real_images_of_every_class_are_drawn_once() -> None:
    labels = torch.tensor([2, 0, 1, 0, 1, 2, 0, 0])
    drawn = drawn_of_each_class(labels, 2)
    assert labels[drawn].tolist() == [0, 0, 1, 1, 2, 2] and len(drawn.unique()) == 6
    assert torch.equal(drawn, drawn_of_each_class(labels, 2))
    assert sorted(drawn_of_each_class(labels, 100).tolist()) == list(range(8))
    assert without(8, drawn).tolist() == sorted(set(range(8)) - set(drawn.tolist()))


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_lower_precision_draws_as_good_garments() -> None:
    """Tokens and pixels in bfloat16, and in int8: class agreement and feature distance within the errors of 300."""
    train, test = (open_source(FASHION_MNIST, split, 32) for split in ("train", "test"))
    images = torch.from_numpy(np.stack([centre_crop(train.image(i), 32) for i in range(12_800)]))
    labels = torch.from_numpy(train.labels[: len(images)].astype(np.int64))
    classifier = train_classifier(images.permute(0, 3, 1, 2), labels, 10, epochs=2)
    real = torch.from_numpy(np.stack([centre_crop(test.image(i), 32) for i in range(2000)])).permute(0, 3, 1, 2)
    assert (predict(classifier, real) == torch.from_numpy(test.labels[:2000])).double().mean() > 0.8

    def measure(dtype: torch.dtype) -> dict:
        decode = ImageDecoder(load_tokenizer("demo"), dtype)
        drawn, asked = generate_samples(PackedGenerator(load_generator("demo"), dtype), decode, per_class=30)
        return evaluate_samples(classifier, drawn, asked, features(classifier, real))

    full = measure(torch.float32)
    assert full["class_accuracy"] > 0.8
    for dtype in (torch.bfloat16, torch.int8):
        reduced = measure(dtype)
        for name in ("class_accuracy", "feature_distance"):
            # Two and a half standard errors of a difference: images change, their quality does not.
            bound = 2.5 * math.hypot(full[f"{name}_error"], reduced[f"{name}_error"])
            assert abs(reduced[name] - full[name]) < bound, (dtype, name, reduced, full)
