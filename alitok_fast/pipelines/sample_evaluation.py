"""Generated images against reference statistics: every measure, of one set or of several seeds, and what it is of.

The features of each set and network lie in a folder of their own, named by a hash of all that could change them:
images, weights, resizing. So a killed run goes on, one with other settings starts anew, and nothing is ever mixed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alitok_fast import __version__
from alitok_fast.data.sources import HELD_OUT
from alitok_fast.evaluation.comparison import PRECISION_IMAGES, check_pairing, compare, doubts
from alitok_fast.evaluation.feature_folder import CHUNK, FeatureFolder, compute_features
from alitok_fast.evaluation.image_sets import ImageSet, StoredImages
from alitok_fast.evaluation.intervals import spread
from alitok_fast.evaluation.networks import Network
from alitok_fast.evaluation.reference import INCEPTION, Reference
from alitok_fast.inference.params import SamplingParams
from alitok_fast.pipelines.bulk import FREE_KEYS, first_says, origin_of_images, wait_for_all
from alitok_fast.pipelines.outputs import MANIFEST_NAME
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.progress import Bar
from alitok_fast.storage.files import read_json
from alitok_fast.storage.text import shown

FORMAT = "alitok_fast evaluation 1"
STD = "_std"  # of a measure over its own parts, as `compare` calls it


@dataclass(frozen=True)
class DrawnImages:
    """Images as a model draws them, kept nowhere: those of `alitok-fast sample` with the same settings."""

    pipe: Pipeline
    labels: Sequence[int]
    params: SamplingParams
    batch_size: int
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"seed {self.params.seed}"

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        return self.pipe.tokenizer.config.image_size

    @property
    def chunk(self) -> int:
        """Whole batches: theirs are then the borders that `BulkRun` has."""
        return -(-CHUNK // self.batch_size) * self.batch_size

    def batches(self, begin: int, end: int) -> Iterator[np.ndarray]:
        for at in range(begin, end, self.batch_size):
            ids = range(at, min(at + self.batch_size, end))
            yield self.pipe([self.labels[i] for i in ids], self.params, image_ids=ids).pixels


def drawn_images(
    pipe: Pipeline, labels: Sequence[int], params: SamplingParams, seeds: Sequence[int], batch_size: int
) -> list[DrawnImages]:
    """A set for each seed. Raises ValueError for a seed that is there twice."""
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"seeds: expected different ones, got {', '.join(map(str, seeds)) or 'none'}")
    about = origin_of_images(pipe, params)
    left = (*FREE_KEYS, "class_names")
    facts = {
        "kind": "drawn",
        **{name: value for name, value in about.items() if name not in left},
        "count": len(labels),
        "classes": len(set(labels)),
        "labels": hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()[:16],
        "batch_size": batch_size,
        "rounding": "truncated to uint8",
    }
    resolved = params.resolved(pipe.generator.config)
    return [
        DrawnImages(pipe, labels, dataclasses.replace(resolved, seed=seed), batch_size, {**facts, "seed": seed})
        for seed in seeds
    ]


def paired(networks: Sequence[Network], references: Sequence[Reference]) -> list[tuple[Network, Reference]]:
    """Each network with the statistics of its own features.

    Raises ValueError for a network without any or with two, for those of a network that is not there, or of other
    weights, another resizing or another normalisation.
    """
    names = [network.name for network in networks]
    if len(set(names)) < len(names):
        raise ValueError(f"network: expected each once, got {', '.join(map(shown, names))}")
    found: dict[str, Reference] = {}
    for reference in references:
        name = str(reference.facts.get("network"))
        if name not in names:
            raise ValueError(
                f"reference: expected statistics of the features of {', '.join(map(shown, names))}, got those of "
                f"{shown(name)} ({reference.kind}'s file)"
            )
        if name in found:
            raise ValueError(f"reference: expected one for each network, got two of {shown(name)}")
        found[name] = reference
    for network in networks:
        name = shown(network.name)
        if network.name not in found:
            raise ValueError(
                f"reference: expected one of {name}'s features, got none; `alitok-fast evaluate reference --data DATA "
                f"--network {name}` makes one"
            )
        check_pairing(network, found[network.name])
    return [(network, found[network.name]) for network in networks]


def measure_samples(
    sets: Sequence[ImageSet],
    pairs: Sequence[tuple[Network, Reference]],
    work: Path,
    batch_size: int = 32,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Measure sets of images, such as those of several seeds, against references, from one pass over each set.

    Args:
        sets: of the same number of images of one size.
        pairs: as `paired` gives them. Where a reference has no features of single images but the images themselves, as
            the ADM suite's files do, those of its first 10,000 are computed, for precision, recall and KID.
        work: folder of the features; 20 kB for an image in Inception. It may be shared by many runs.
        batch_size: reference images computed together, which may change last bits.
        rank: of this process among `world`, each of which makes the same call; rank 0 measures.
        progress: show a bar, in the first process.

    Returns:
        JSON values: under "measures", by network and by the name that `compare` gives, the value of each set, their
        mean, and with several sets the standard deviation and the half-width of the mean's 95% interval; "std_of_parts"
        is what KID and Inception Score have over their own subsets. "doubts" says what makes the numbers incomparable
        with published ones; the rest is what they are of. None in all processes but the first.

    Raises:
        ValueError: for sets of different numbers or sizes.
    """
    _check_alike(sets)
    networks = [network for network, _ in pairs]
    folders = [
        features_of(images, networks, work, (number, len(sets)), rank, world, progress)
        for number, images in enumerate(sets, 1)
    ]
    vectors = [_vectors(*pair, work, batch_size, rank, world, progress) for pair in pairs]
    if rank:
        return None
    measures, said = {}, []
    for place, (network, reference) in enumerate(pairs):
        found = [compare(folder[place], reference, vectors[place], network.inception) for folder in folders]
        measures[network.name] = _summary(found)
        lines = doubts(folders[0][place], reference) + _doubts_of_split(reference)
        said += lines if len(pairs) == 1 else [f"{shown(network.name)}: {line}" for line in lines]
    return {
        "format": FORMAT,
        "measures": measures,
        "doubts": list(dict.fromkeys(said)),
        "count": sets[0].count,
        "size": sets[0].size,
        "sets": [{"name": images.name, **images.facts, **_made(images)} for images in sets],
        "networks": {network.name: dict(network.facts) for network in networks},
        "references": {network.name: described_reference(reference) for network, reference in pairs},
        "device": str(networks[0].device),
        "versions": {"alitok_fast": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def features_of(
    images: ImageSet,
    networks: Sequence[Network],
    work: Path,
    number: tuple[int, int] = (1, 1),
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> list[FeatureFolder]:
    """The features of a set in each network, whole, in folders under `work`; every process makes the same call.

    `number`: of the set among how many, for the progress bar.
    """
    folders = first_says(lambda: [_folder(images, network, work) for network in networks], rank, world)
    mine = set(folders[0].chunks[rank::world])
    share = sum(len(chunk) for chunk in {chunk for folder in folders for chunk in folder.missing()} & mine)
    parts = [f"features of {images.name}"]
    parts += [f"set {number[0]} of {number[1]}"] if number[1] > 1 else []
    parts += [f"process 1 of {world}"] if world > 1 else []
    with Bar(", ".join(parts), share, enabled=progress and rank == 0) as bar:
        wanted = list(zip(folders, networks, strict=True))
        compute_features(wanted, images.batches, rank, world, lambda count: bar.advance(by=count))
    wait_for_all(world)
    return folders


def _folder(images: ImageSet, network: Network, work: Path) -> FeatureFolder:
    facts = {"images": dict(images.facts), "size": images.size, **network.facts}
    return FeatureFolder.named(work, network.name, images.count, facts, images.chunk)


def _vectors(
    network: Network, reference: Reference, work: Path, batch_size: int, rank: int, world: int, progress: bool
) -> Tensor | None:
    """Pooled features of single reference images, where there are any."""
    if reference.vectors is not None or reference.images is None:
        return reference.vectors
    known = reference.sha256
    images = StoredImages.open(reference.images, batch_size, PRECISION_IMAGES, known, "reference")
    (folder,) = features_of(images, [network], work, (1, 1), rank, world, progress)
    return folder.vectors("pooled") if rank == 0 else None


def _check_alike(sets: Sequence[ImageSet]) -> None:
    if not sets:
        raise ValueError("images: expected at least one set, got none")
    for name in ("count", "size"):
        values = {getattr(images, name) for images in sets}
        if len(values) > 1:
            raise ValueError(f"images: expected sets of one {name}, got {', '.join(map(str, sorted(values, key=str)))}")
    prints = [json.dumps(images.facts, sort_keys=True) for images in sets]
    if len(set(prints)) < len(prints):
        raise ValueError("images: expected different sets, got one of them twice")


def _summary(found: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Of the measures of each set; those over their own parts are an entry of the measure."""
    measures: dict[str, dict[str, Any]] = {}
    for name in found[0]:
        values = [one[name] for one in found]
        if name.endswith(STD):
            measures[name.removesuffix(STD)]["std_of_parts"] = spread(values).mean
            continue
        mean, std, half = spread(values)
        measures[name] = {"mean": mean, "values": values}
        if std is not None:
            measures[name] |= {"std": std, "interval": half}
    return measures


def described_reference(reference: Reference) -> dict[str, Any]:
    """Where statistics are from, as JSON values."""
    counts = {name: moments.count for name, moments in reference.moments.items()}
    return {"kind": reference.kind, "sha256": reference.sha256, "counts": counts, "facts": dict(reference.facts)}


def _doubts_of_split(reference: Reference) -> list[str]:
    """Statistics of held-out images are those of rFID."""
    name = str(reference.facts.get("images", {}).get("name", ""))
    if reference.facts.get("network") != INCEPTION or name.rpartition("/")[2] not in HELD_OUT:
        return []
    return [
        f"the reference is of the split {shown(name)}: reconstructions are measured against held-out images, published "
        "numbers of generated ones are against the training images (ImageNet's: the ADM suite's file)"
    ]


def _made(images: ImageSet) -> dict[str, Any]:
    """What the manifest beside images that were sampled here says of them."""
    if not isinstance(images, StoredImages):
        return {}
    file = images.path / MANIFEST_NAME if images.files else images.path.with_name(images.path.name + ".json")
    try:
        manifest = read_json(file)
    except (OSError, ValueError):
        return {}
    return {"manifest": {name: value for name, value in manifest.items() if name not in ("labels", "class_names")}}
