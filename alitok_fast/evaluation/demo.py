"""Measure a tokenizer and a generator of ours against the real test set.

    python -m alitok_fast.evaluation.demo --data /usr/share/datasets/fashion-mnist

PSNR and codebook use of the tokenizer on all test images; then, for every
guidance and precision asked for, the share of samples that a small
classifier, trained here on the real training images, gives the class asked
for, and the Frechet distance of its features from those of the test images,
each with its standard error.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alitok_fast.data import open_source
from alitok_fast.data.transforms import centre_crop
from alitok_fast.evaluation.classifier import SmallClassifier, features, predict, train_classifier
from alitok_fast.evaluation.codebook import codebook_perplexity, codebook_usage
from alitok_fast.evaluation.measures import frechet_distance, standard_error
from alitok_fast.evaluation.moments import Moments
from alitok_fast.evaluation.psnr import psnr
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.sampler import Sampler
from alitok_fast.inference.step_model import StepModel, prepare
from alitok_fast.models.generator import Generator
from alitok_fast.models.loading import dtype_from_name, load_generator, load_tokenizer
from alitok_fast.models.tokenizer import Tokenizer


def all_images(source, size: int) -> Tensor:
    """Every image of a source (alitok_fast.data.open_source), centre-cropped: (n, 3, size, size) uint8."""
    images = np.stack([centre_crop(source.image(i), size) for i in range(len(source))])
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


@torch.inference_mode()
def evaluate_tokenizer(tokenizer: Tokenizer, images: Tensor, batch_size: int = 250) -> dict[str, float]:
    """Reconstruction and codebook use over images (n, 3, S, S) uint8.

    `psnr` is the mean of the images' PSNR in dB; `psnr_of_mean_error` that of the error averaged over all images.
    """
    scores, counts = [], torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64)
    for part in images.split(batch_size):
        real = part.float() / 255
        tokens = tokenizer.encode(real)
        scores.append(psnr(real, tokenizer.decode(tokens).clamp(0, 1)))
        counts += torch.bincount(tokens.flatten(), minlength=len(counts))
    psnrs = torch.cat(scores)
    mean_error = (10 ** (-psnrs / 10)).mean()
    return {
        "images": len(images),
        "psnr": float(psnrs.mean()),
        "psnr_of_mean_error": float(-10 * torch.log10(mean_error)),
        "codebook_usage": codebook_usage(counts),
        "codebook_perplexity": codebook_perplexity(counts),
    }


def generate_samples(
    generator: Generator | StepModel,
    decode: Callable[[Tensor], Tensor],
    per_class: int,
    seed: int = 0,
    batch_size: int = 250,
    **sampling,
) -> tuple[Tensor, Tensor]:
    """`per_class` images of every class, (n, 3, S, S) in [0, 1], and their labels (n,).

    `decode` turns tokens into images: `Tokenizer.decode` or an `ImageDecoder`.
    """
    labels = torch.arange(generator.config.num_classes).repeat(per_class)
    ids = torch.arange(len(labels))
    sampler = Sampler(generator)
    images = [
        decode(sampler(part, seed=seed, image_ids=numbers, **sampling)).clamp(0, 1)
        for part, numbers in zip(labels.split(batch_size), ids.split(batch_size), strict=True)
    ]
    return torch.cat(images), labels


def evaluate_samples(
    classifier: SmallClassifier, images: Tensor, labels: Tensor, real_features: Tensor
) -> dict[str, Any]:
    """Class agreement and feature distance of samples (n, 3, S, S), with their standard errors.

    `real_features` as `features` returns them for real images.
    """
    agreed = (predict(classifier, images) == labels).double()
    sampled = features(classifier, images)

    real = Moments.of(real_features)

    def distance(values: Tensor) -> float:
        return frechet_distance(Moments.of(values), real)

    return {
        "samples": len(labels),
        "class_accuracy": float(agreed.mean()),
        "class_accuracy_error": float(agreed.std() / len(agreed) ** 0.5),
        "feature_distance": distance(sampled),
        "feature_distance_error": standard_error(distance, sampled),
        "by_class": [float(agreed[labels == i].mean()) for i in range(int(labels.max()) + 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the IDX files or pictures of both splits")
    parser.add_argument("--tokenizer", default="demo", help="tokenizer: a name, folder or file")
    parser.add_argument("--generator", default="demo", help="generator: a name, folder or file")
    parser.add_argument("--per-class", type=int, default=100, help="samples of each class")
    parser.add_argument("--guidance", action="append", metavar="SCALE,POWER", help="repeatable; default: the preset's")
    parser.add_argument("--precision", action="append", metavar="WEIGHTS",
                        help="float32, bfloat16 or int8; repeatable; default: float32")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    tokenizer, generator = load_tokenizer(arguments.tokenizer), load_generator(arguments.generator)
    size = tokenizer.config.image_size
    train_source, test_source = (open_source(arguments.data, name, size, draft=False) for name in ("train", "test"))
    test_images, test_labels = all_images(test_source, size), torch.from_numpy(test_source.labels)
    print(json.dumps({"tokenizer": evaluate_tokenizer(tokenizer, test_images)}), flush=True)

    classifier = train_classifier(
        all_images(train_source, size), torch.from_numpy(train_source.labels), len(train_source.class_names)
    )
    accuracy = (predict(classifier, test_images) == test_labels).double().mean()
    print(json.dumps({"classifier_test_accuracy": float(accuracy)}), flush=True)

    config, real_features = generator.config, features(classifier, test_images)
    guidance = arguments.guidance or [f"{config.guidance_scale},{config.guidance_power}"]
    for text, precision in itertools.product(guidance, arguments.precision or ["float32"]):
        scale, power = map(float, text.split(","))
        dtype = dtype_from_name(precision, "weight_dtype")
        decode = ImageDecoder(tokenizer, dtype)
        images, labels = generate_samples(
            prepare(generator, dtype), decode, arguments.per_class, arguments.seed,
            guidance_scale=scale, guidance_power=power, temperature=arguments.temperature,
        )  # fmt: skip
        result: dict[str, Any] = evaluate_samples(classifier, images, labels, real_features)
        result["by_class"] = dict(zip(train_source.class_names, result["by_class"], strict=True))
        setting = {"guidance_scale": scale, "guidance_power": power, "weight_dtype": precision,
                   "decode_dtype": str(decode.dtype).removeprefix("torch.")}  # fmt: skip
        print(json.dumps({**setting, **result}), flush=True)


if __name__ == "__main__":
    main()
