"""Evaluation while a model trains, by the functions of `alitok-fast evaluate` and with its numbers.

Features of the images lie in files under the run's folder while they are computed, so that several processes share the
images; those of pictures that stay the same are kept.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alitok_fast.data import ImageSource, TokenCache, check_source
from alitok_fast.data.reading import default_workers
from alitok_fast.evaluation.comparison import PRECISION_IMAGES, check_pairing, compare, doubts_of_samples
from alitok_fast.evaluation.feature_folder import Extractor, FeatureFolder, Images, compute_features
from alitok_fast.evaluation.image_sets import CROP, CroppedImages, StoredImages
from alitok_fast.evaluation.networks import Network, load_network
from alitok_fast.evaluation.reconstruction import (
    ReconstructionMeasure,
    image_measures,
    reconstruction_distances,
    reconstruction_doubts,
)
from alitok_fast.evaluation.reference import Reference, read_reference
from alitok_fast.evaluation.similarity import WINDOW
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.image_encoder import ImageEncoder
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.sampler import Sampler
from alitok_fast.models.generator import Generator
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.storage.images import to_uint8
from alitok_fast.training.ranks import Ranks

SEED = 0
BATCH = 32  # images computed together, as the commands do; also those of a file, which one process computes
WEIGHTS = "evaluate_weights"  # the setting, for messages

_log = logging.getLogger(__name__)


class EvaluationStopped(Exception):
    """Some process was asked to end in the middle of an evaluation."""


@dataclass(frozen=True)
class Workplace:
    """Where and how an evaluation runs: the folder of its features, the processes, and whether to break off."""

    work: Path
    ranks: Ranks
    stop: Callable[[], bool]

    def features(self, make: Callable[[], FeatureFolder], images: Images, extractor: Extractor) -> FeatureFolder:
        """Computed by all processes. Raises EvaluationStopped in all of them."""
        with self.ranks.main_first():
            folder = make()
        stopped = False
        try:
            compute_features([(folder, extractor)], images, self.ranks.rank, self.ranks.world, self._go_on)
        except EvaluationStopped:
            stopped = True
        if self.ranks.agree(stopped):
            raise EvaluationStopped
        return folder

    def anew(self, count: int) -> FeatureFolder:
        """For features of what the model makes by now; a killed evaluation begins again."""
        if self.ranks.main:
            shutil.rmtree(self._passing, ignore_errors=True)
        return FeatureFolder(self._passing, count, {}, BATCH)

    def forget(self) -> None:
        """The features of `anew` are done with."""
        shutil.rmtree(self._passing)

    @property
    def _passing(self) -> Path:
        return self.work / "now"

    def _go_on(self, count: int) -> None:
        if self.stop():
            raise EvaluationStopped


@dataclass(frozen=True)
class SampleEvaluation:
    """Samples of a generator against statistics of real images: what `evaluate samples` says of them.

    Each class has equally many, with seed 0.
    """

    tokenizer: Tokenizer
    network: Network
    reference: Reference
    labels: Sequence[int]
    params: SamplingParams

    @classmethod
    def open(
        cls,
        cache: TokenCache,
        images: int,
        tokenizer: Tokenizer | None,
        reference: str | Path | None,
        weights: str | Path | None,
        guidance: float | None,
        ranks: Ranks,
    ) -> SampleEvaluation:
        """Raises ValueError naming the setting for what is missing or does not fit; as `load_network` for others."""
        for name, value in (("tokenizer", tokenizer), ("reference", reference)):
            if value is None:
                raise ValueError(f"evaluate_every: expected a {name} (--{name}) to evaluate samples with, got none")
        assert tokenizer is not None and reference is not None
        for name in ("num_tokens", "codebook_size"):
            expected, got = getattr(cache.meta, name), getattr(tokenizer.config, name)
            if expected != got:
                raise ValueError(f"tokenizer: expected {name} {expected} as in the cache, got {got}")
        classes, size = len(cache.meta.class_names), tokenizer.config.image_size
        if images % classes:
            near = classes * max(1, images // classes)
            raise ValueError(f"evaluate_images: expected a multiple of the {classes} classes ({near}), got {images}")
        statistics = read_reference(Path(reference))
        if statistics.facts.get("size", size) != size:
            raise ValueError(f"reference: expected images of {size} pixels, got {statistics.facts['size']}")
        network = _network(str(statistics.facts.get("network")), weights, ranks, "reference")
        check_pairing(network, statistics)
        _say(doubts_of_samples(images, {**network.facts, "size": size}, statistics), ranks)
        labels = [i % classes for i in range(images)]
        return cls(tokenizer, network, statistics, labels, SamplingParams(guidance_scale=guidance, seed=SEED))

    def __call__(self, generator: Generator, place: Workplace) -> dict[str, float]:
        """What `compare` says, in the main process. `generator`: in evaluation mode, its weights plain."""
        vectors = self._vectors(place)
        sampler, decode = Sampler(generator), ImageDecoder(self.tokenizer)

        def images(begin: int, end: int) -> Iterator[np.ndarray]:
            for at in range(begin, end, BATCH):
                ids = list(range(at, min(at + BATCH, end)))
                yield to_uint8(decode(sampler([self.labels[i] for i in ids], self.params, image_ids=ids)))

        folder = place.features(lambda: place.anew(len(self.labels)), images, self.network)
        if not place.ranks.main:
            return {}
        found = compare(folder, self.reference, vectors, self.network.inception)
        place.forget()
        return found

    def _vectors(self, place: Workplace) -> torch.Tensor | None:
        """Pooled features of the images in an ADM file, which has none itself."""
        if self.reference.vectors is not None or self.reference.images is None:
            return None
        known = self.reference.sha256
        images = StoredImages.open(self.reference.images, BATCH, PRECISION_IMAGES, known, "reference")
        facts = {"images": dict(images.facts), **self.network.facts}
        folder = place.features(
            lambda: FeatureFolder.named(place.work, "reference", images.count, facts, BATCH),
            images.batches,
            self.network,
        )
        return folder.vectors("pooled") if place.ranks.main else None


@dataclass(frozen=True)
class ReconstructionEvaluation:
    """What a tokenizer makes of held-out pictures: what `evaluate reconstruction` says of them.

    The distance is from the pictures' own features, in `network`; without one there is none.
    """

    images: CroppedImages
    network: Network | None

    @classmethod
    def open(
        cls,
        source: ImageSource | None,
        count: int,
        size: int,
        network: str | None,
        weights: str | Path | None,
        ranks: Ranks,
    ) -> ReconstructionEvaluation:
        """Of `count` pictures, evenly spaced over the source, or all where there are fewer.

        Raises ValueError naming the setting for what is missing or does not fit; as `load_network` for others.
        """
        if source is None:
            raise ValueError("evaluate_every: expected held-out pictures (--evaluate-data), got none")
        check_source(source)
        if size < WINDOW:
            raise ValueError(f"evaluate_every: expected images of at least {WINDOW} pixels, for SSIM, got {size}")
        if network is None and weights is not None:
            raise ValueError(f"{WEIGHTS}: expected the network (--evaluate-network), got its weights alone")
        chosen = source if count >= len(source) else EvenlySpaced(source, count)
        images = CroppedImages(chosen, size, BATCH, default_workers(), "as the source gives them", chunk=BATCH)
        judge = None if network is None else _network(network, weights, ranks, "evaluate_network")
        if judge is not None:
            facts: dict[str, Any] = {"size": size, "crop": CROP, "lpips": None}
            _say(reconstruction_doubts(images.count, source, facts, [judge], None), ranks)
        return cls(images, judge)

    def __call__(self, tokenizer: Tokenizer, place: Workplace) -> dict[str, float]:
        """Figures by name, in the main process. `tokenizer`: in evaluation mode, its weights plain."""
        reference = self._originals(place)
        networks = [] if self.network is None else [self.network]
        encoder, decoder = ImageEncoder(tokenizer, torch.float32), ImageDecoder(tokenizer, torch.float32)
        measure = ReconstructionMeasure(encoder, decoder, networks, None, originals=False)
        folder = place.features(lambda: place.anew(self.images.count), self.images.batches, measure)
        if not place.ranks.main:
            return {}
        found = image_measures(folder, tokenizer.config.codebook_size)
        for network in networks:
            found |= reconstruction_distances(folder, network, reference)
        place.forget()
        return {name: value for name, value in found.items() if value is not None}

    def _originals(self, place: Workplace) -> Reference | None:
        """The pictures' own features, computed once; None without a network, and but in the main process."""
        images, network = self.images, self.network
        if network is None:
            return None
        facts = {"images": dict(images.facts), "size": images.size, "crop": CROP, **network.facts}
        folder = place.features(
            lambda: FeatureFolder.named(place.work, "originals", images.count, facts, BATCH), images.batches, network
        )
        if not place.ranks.main:
            return None
        return Reference({"pooled": folder.moments("pooled")}, network.facts, vectors=folder.vectors("pooled"))


class EvenlySpaced:
    """`count` pictures of a source, as far apart as they can be: data sets have class after class."""

    def __init__(self, source: ImageSource, count: int) -> None:
        self.name, self.class_names = source.name, source.class_names
        self._source, self._chosen = source, [i * len(source) // count for i in range(count)]
        self.labels = np.asarray(source.labels)[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def image(self, index: int) -> np.ndarray:
        return self._source.image(self._chosen[index])


def _network(name: str, weights: str | Path | None, ranks: Ranks, setting: str) -> Network:
    """As `load_network`, without drawing random numbers; `setting` is what messages call its name."""
    with torch.random.fork_rng([]):
        try:
            return load_network(name, weights, ranks.device, WEIGHTS)
        except ValueError as error:
            raise ValueError(re.sub("^network:", f"{setting}:", str(error))) from None


def _say(doubts: Sequence[str], ranks: Ranks) -> None:
    for line in doubts if ranks.main else ():
        _log.warning("evaluation: %s", line)
