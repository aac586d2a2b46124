"""All measures of a set of generated images against a reference, from one pass of features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from alitok_fast.evaluation.feature_folder import FeatureFolder
from alitok_fast.evaluation.measures import frechet_distance, inception_score, kernel_distance, precision_recall
from alitok_fast.evaluation.moments import Moments
from alitok_fast.evaluation.networks import Network
from alitok_fast.evaluation.reference import Reference
from alitok_fast.storage.text import shown

IMAGES = 50_000  # of the published numbers
PRECISION_IMAGES = 10_000  # of the reference, for precision and recall: the ADM suite's number
INCEPTION_FILE = "6726825d"  # the beginning of the SHA-256 of torch-fidelity's file of TensorFlow's weights
SUBSET = 1000  # vectors of a subset of the kernel distance

# What a measure is called in Inception's features; in those of another network it has the name on the left.
INCEPTION_NAMES = {
    "frechet_distance": "fid",
    "spatial_frechet_distance": "sfid",
    "kernel_distance": "kid",
    "class_score": "inception_score",
}


def compare(
    features: FeatureFolder, reference: Reference, vectors: Tensor | None = None, inception: bool = True
) -> dict[str, float]:
    """Every measure for which there is what it needs, by name.

    The Frechet distance of "pooled", and of "spatial" where both sides have it; the score of "logits" in ten parts of
    the images in order, as the ADM suite has it; precision, recall and the kernel distance where pooled features of
    reference images are given (in subsets of 1,000, or of as many as the smaller set has). Those of means over parts
    have their standard deviation as NAME_std.

    Args:
        features: of all images, with "pooled", and maybe "spatial" and "logits".
        reference: moments of the same network's features.
        vectors: (m, d) pooled features of reference images; None takes `reference.vectors`.
        inception: whether the features are Inception's, so that measures have the field's names (`INCEPTION_NAMES`).

    Raises:
        ValueError: for features that do not fit each other, or are missing.
    """
    names: Mapping[str, str] = INCEPTION_NAMES if inception else {}
    found: dict[str, float] = {}

    def put(name: str, mean: float, std: float | None = None) -> None:
        name = names.get(name, name)
        found[name] = mean
        if std is not None:
            found[f"{name}_std"] = std

    there = features.names()
    for name, measure in (("pooled", "frechet_distance"), ("spatial", "spatial_frechet_distance")):
        if name == "pooled" or (name in there and name in reference.moments):
            put(measure, frechet_distance(features.moments(name), _of_reference(reference, name)))
    if "logits" in there:
        put("class_score", *inception_score(features.vectors("logits"), splits=min(10, features.count)))
    vectors = reference.vectors if vectors is None else vectors
    if vectors is not None:
        pooled = features.vectors("pooled")
        size = min(SUBSET, len(pooled), len(vectors))
        put("kernel_distance", *kernel_distance(pooled, vectors, subset_size=size))
        found |= precision_recall(pooled, vectors)._asdict()
    return found


def check_pairing(network: Network, reference: Reference) -> None:
    """ValueError for statistics of the network's features with other weights, resizing or normalisation."""
    for key in ("weights", "resize", "normalisation"):
        if key in reference.facts and reference.facts[key] != network.facts[key]:
            expected, got = network.facts[key], shown(reference.facts[key])
            raise ValueError(
                f"reference: expected statistics of {shown(network.name)} with {key} {expected}, got {got}"
            )


def doubts(features: FeatureFolder, reference: Reference) -> list[str]:
    """What makes these numbers incomparable with published ones, in sentences; none where nothing is known to."""
    return doubts_of_samples(features.count, features.facts, reference)


def doubts_of_samples(images: int, facts: Mapping[str, Any], reference: Reference) -> list[str]:
    """As `doubts`, of so many images, whose features have these facts."""
    found = []
    if images != IMAGES:
        found.append(
            f"the images are {images:,}, published numbers are of {IMAGES:,}: a Frechet distance falls as "
            "their number grows"
        )
    count = next(iter(reference.moments.values())).count
    if count is not None and count < IMAGES and reference.kind == "alitok_fast":
        found.append(f"the reference has {count:,} images: the fewer, the larger a Frechet distance")
    return found + doubts_of_network(facts) + doubts_of_pairing(facts, reference)


def doubts_of_network(facts: Mapping[str, Any]) -> list[str]:
    """What of a network's facts makes its features incomparable with published ones, in sentences."""
    file = str(facts.get("weights_file", ""))
    if facts.get("network") != "inception" or file.startswith(INCEPTION_FILE):
        return []
    return [
        f"Inception's weights are of a file whose SHA-256 begins with {file[:8]}, published numbers are of those of "
        f"{INCEPTION_FILE}"
    ]


def doubts_of_pairing(facts: Mapping[str, Any], reference: Reference) -> list[str]:
    """What the images' features have otherwise than those of a reference, in sentences."""
    both = sorted(facts.keys() & reference.facts.keys() & {"network", "weights", "size", "crop"})
    return [
        f"{name}: the images have {facts[name]!r}, the reference has {reference.facts[name]!r}"
        for name in both
        if facts[name] != reference.facts[name]
    ]


def _of_reference(reference: Reference, name: str) -> Moments:
    if name not in reference.moments:
        raise ValueError(f"reference: expected moments of {name!r}, got those of {', '.join(reference.moments)}")
    return reference.moments[name]
