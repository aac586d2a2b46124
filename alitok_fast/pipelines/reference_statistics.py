"""Statistics of a set of real images, against which generated ones are measured."""

from __future__ import annotations

from pathlib import Path

import torch

from alitok_fast.evaluation.feature_folder import FeatureFolder
from alitok_fast.evaluation.image_sets import CROP, CroppedImages, ImageSet
from alitok_fast.evaluation.networks import Network
from alitok_fast.evaluation.reference import Reference
from alitok_fast.pipelines.sample_evaluation import PRECISION_IMAGES, features_of

WITH_MOMENTS = ("pooled", "spatial")


def reference_statistics(
    images: ImageSet,
    network: Network,
    work: Path,
    vectors: int = PRECISION_IMAGES,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> Reference | None:
    """Moments of a network's features of a set of images, with what could change them; None but in process 0.

    Args:
        work: folder of the features of single images; 20 kB for one in Inception.
        vectors: images, evenly spaced over the set, whose pooled features are kept for precision, recall and KID; all,
            where there are fewer. 0 keeps none.

    Raises:
        ValueError: for a negative number.
    """
    if vectors < 0:
        raise ValueError(f"images_for_precision: expected at least 0, got {vectors}")
    (features,) = features_of(images, [network], work, rank=rank, world=world, progress=progress)
    if rank:
        return None
    there = features.names()
    moments = {name: features.moments(name) for name in WITH_MOMENTS if name in there}
    crop = {"crop": CROP} if isinstance(images, CroppedImages) else {}
    facts = {"images": dict(images.facts), "size": images.size, **crop, **network.facts}
    kept = _evenly(features, min(vectors, images.count)) if vectors else None
    return Reference(moments, facts, vectors=kept)


def _evenly(features: FeatureFolder, count: int) -> torch.Tensor:
    """Pooled features of `count` images, as far apart as they can be: data sets have class after class."""
    wanted = torch.arange(count) * features.count // count
    chosen, begin = [], 0
    for part in features.parts("pooled"):
        inside = wanted[(wanted >= begin) & (wanted < begin + len(part))]
        chosen.append(part[inside - begin])
        begin += len(part)
    return torch.cat(chosen)
