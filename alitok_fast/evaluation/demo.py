"""Measure a tokenizer and a generator of ours against the real test set.

    python -m alitok_fast.evaluation.demo --data /usr/share/datasets/fashion-mnist

A small classifier is trained on the real training images. Then come PSNR and
codebook use of the tokenizer on all test images; and, for every guidance and
precision asked for, the share of samples to which the classifier gives the
class asked for. Reconstructions and samples have the Frechet distance of the
classifier's features from those of the test images, with standard errors; as
many real images, which are drawn from the training images, are beside them.

With --choose, a classifier of another seed judges, and 10,000 training images
take the place of the test images: what is chosen by these numbers (weights,
guidance) has not seen those that are then reported.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alitok_fast.data import open_source
from alitok_fast.evaluation.classifier import features, predict, train_classifier
from alitok_fast.evaluation.judge import all_images, evaluate_samples, evaluate_tokenizer, generate_samples
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.step_model import prepare
from alitok_fast.models.loading import dtype_from_name, load_generator, load_tokenizer

CHOOSING_PER_CLASS = 1000  # as many of each class as the test images of Fashion-MNIST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the IDX files or pictures of both splits")
    parser.add_argument("--tokenizer", default="demo", help="tokenizer: a name, folder or file")
    parser.add_argument("--generator", default="demo", help="generator: a name, folder or file")
    parser.add_argument("--per-class", type=int, default=100, help="samples of each class")
    parser.add_argument("--guidance", action="append", metavar="SCALE,POWER", help="repeatable; default: the preset's")
    parser.add_argument("--precision", action="append", metavar="WEIGHTS",
                        help="float32, bfloat16, int8, or int8,int8: with 8-bit activations; repeatable")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--choose", action="store_true", help="another classifier, and training images for test images")
    arguments = parser.parse_args()

    tokenizer, generator = load_tokenizer(arguments.tokenizer), load_generator(arguments.generator)
    size = tokenizer.config.image_size
    train_source, test_source = (open_source(arguments.data, name, size, draft=False) for name in ("train", "test"))
    test_images, test_labels = all_images(test_source, size), torch.from_numpy(test_source.labels)
    train_images, train_labels = all_images(train_source, size), torch.from_numpy(train_source.labels)
    classifier = train_classifier(train_images, train_labels, len(train_source.class_names), seed=int(arguments.choose))
    accuracy = (predict(classifier, test_images) == test_labels).double().mean()
    print(json.dumps({"classifier_test_accuracy": float(accuracy)}), flush=True)

    judged, others = test_images, torch.arange(len(train_images))
    if arguments.choose:
        chosen = drawn_of_each_class(train_labels, CHOOSING_PER_CLASS, seed=1)
        judged, others = train_images[chosen], without(len(train_images), chosen)
    real_features = features(classifier, judged)
    drawn = others[drawn_of_each_class(train_labels[others], arguments.per_class)]
    real = evaluate_samples(classifier, train_images[drawn].float() / 255, train_labels[drawn], real_features)
    print(json.dumps({"real": _named(real, train_source.class_names)}), flush=True)
    print(json.dumps({"tokenizer": evaluate_tokenizer(tokenizer, judged, classifier=classifier)}), flush=True)

    config = generator.config
    guidance = arguments.guidance or [f"{config.guidance_scale},{config.guidance_power}"]
    for text, precision in itertools.product(guidance, arguments.precision or ["float32"]):
        scale, power = map(float, text.split(","))
        weights, _, activations = precision.partition(",")
        dtype = dtype_from_name(weights, "weight_dtype")
        decode = ImageDecoder(tokenizer, dtype)
        prepared = prepare(generator, dtype, dtype_from_name(activations or None, "activation_dtype"))
        images, labels = generate_samples(
            prepared, decode, arguments.per_class, arguments.seed,
            guidance_scale=scale, guidance_power=power, temperature=arguments.temperature,
        )  # fmt: skip
        result = _named(evaluate_samples(classifier, images, labels, real_features), train_source.class_names)
        setting = {"guidance_scale": scale, "guidance_power": power, "weight_dtype": weights,
                   "activation_dtype": activations or None,
                   "decode_dtype": str(decode.dtype).removeprefix("torch.")}  # fmt: skip
        print(json.dumps({**setting, **result}), flush=True)


def drawn_of_each_class(labels: Tensor, per_class: int, seed: int = 0) -> Tensor:
    """Indices of `per_class` images of every class, drawn without replacement; of all, where a class has fewer."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:per_class] for label in labels.unique()])


def without(count: int, chosen: Tensor) -> Tensor:
    """The indices below `count` that are not among `chosen`, in order."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[chosen] = False
    return kept.nonzero().squeeze(1)


def _named(result: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    return {**result, "by_class": dict(zip(class_names, result["by_class"], strict=True))}


if __name__ == "__main__":
    main()
