"""Small tokenizers and generators judged by a small classifier of the same data (alitok_fast.evaluation.classifier).

For images that no pretrained network knows, such as Fashion-MNIST's. Distances of its features compare only with each
other; a distance of real images from real images says what the best of generators would have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from alitok_fast.data.transforms import centre_crop
from alitok_fast.evaluation.classifier import SmallClassifier, features, predict
from alitok_fast.evaluation.codebook import codebook_perplexity, codebook_usage
from alitok_fast.evaluation.measures import frechet_distance, standard_error
from alitok_fast.evaluation.moments import Moments
from alitok_fast.evaluation.psnr import psnr
from alitok_fast.inference.sampler import Sampler
from alitok_fast.inference.step_model import StepModel
from alitok_fast.models.generator import Generator


class ImageTokenizer(Protocol):
    """Whatever turns images into tokens and back, on the CPU or on the device where its images are.

    `codebook_size` is the number of different tokens. `encode` takes (B, 3, S, S) in [0, 1] to (B, N) int64, and
    `decode` such tokens to images in [0, 1], or nearly.
    """

    @property
    def codebook_size(self) -> int: ...

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, tokens: Tensor) -> Tensor: ...


def all_images(source, size: int) -> Tensor:
    """Every image of a source (alitok_fast.data.open_source), centre-cropped: (n, 3, size, size) uint8."""
    images = np.stack([centre_crop(source.image(i), size) for i in range(len(source))])
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


@torch.inference_mode()
def evaluate_tokenizer(
    tokenizer: ImageTokenizer,
    images: Tensor,
    batch_size: int = 250,
    classifier: SmallClassifier | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Reconstruction and codebook use over images (n, 3, S, S) uint8.

    `psnr` is the mean of the images' PSNR in dB; `psnr_of_mean_error` that of the error averaged over all images. With
    a classifier, `distance` is the Frechet distance of its features of the reconstructions from those of the images,
    and `distance_error` its standard error.
    """
    scores, counts, seen = [], torch.zeros(tokenizer.codebook_size, dtype=torch.int64), []
    for part in images.split(batch_size):
        real = part.float() / 255
        tokens = tokenizer.encode(real.to(device))
        decoded = tokenizer.decode(tokens).clamp(0, 1).cpu()
        scores.append(psnr(real, decoded))
        counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
        if classifier is not None:
            seen.append(features(classifier, decoded))
    psnrs = torch.cat(scores)
    mean_error = (10 ** (-psnrs / 10)).mean()
    apart = {} if classifier is None else _distances("distance", torch.cat(seen), features(classifier, images))
    return {
        "images": len(images),
        "psnr": float(psnrs.mean()),
        "psnr_of_mean_error": float(-10 * torch.log10(mean_error)),
        "codebook_usage": codebook_usage(counts),
        "codebook_perplexity": codebook_perplexity(counts),
        **apart,
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
        decode(sampler(part, seed=seed, image_ids=numbers, **sampling)).clamp(0, 1).cpu()
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

    return {
        "samples": len(labels),
        "class_accuracy": float(agreed.mean()),
        "class_accuracy_error": float(agreed.std() / len(agreed) ** 0.5),
        **_distances("feature_distance", sampled, real_features),
        "by_class": [float(agreed[labels == i].mean()) for i in range(int(labels.max()) + 1)],
    }


def _distances(name: str, values: Tensor, real: Tensor) -> dict[str, float]:
    moments = Moments.of(real)

    def distance(chosen: Tensor) -> float:
        return frechet_distance(Moments.of(chosen), moments)

    return {name: distance(values), f"{name}_error": standard_error(distance, values)}
