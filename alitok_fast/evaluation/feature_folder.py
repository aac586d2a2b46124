"""Features of many images in files of a fixed number of images each: computed by any number of processes, and resumed.

What is computed of them goes through the files in order, so that its numbers do not depend on how many processes there
were, or on where a run was killed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from alitok_fast.evaluation.moments import Moments, MomentSums
from alitok_fast.storage.files import differences, leftovers, read_json, write_atomically, write_json
from alitok_fast.storage.tensor_files import read_tensors

FORMAT = "alitok_fast features 1"
ABOUT = "features.json"
CHUNK = 1000  # images of a file

Images = Callable[[int, int], Iterable[np.ndarray]]  # begin, end -> those images, (b, H, W, 3) uint8 piece by piece
Extractor = Callable[[Tensor], Mapping[str, Tensor]]  # (b, 3, H, W) uint8 -> features (b, d) by name


class FeatureFolder:
    """Of `count` images; begun where there is none, gone on with where there is one of the same images.

    Args:
        path: the folder, made where it is missing.
        count: images, >= 1.
        facts: what could change the features: the images' file or model and seeds, the network, its weights' hash.
        chunk: images of a file.

    Raises:
        ValueError: for a folder of other features, naming what differs, or one with other things in it.
    """

    def __init__(self, path: Path, count: int, facts: Mapping[str, Any], chunk: int = CHUNK) -> None:
        if count < 1 or chunk < 1:
            raise ValueError(f"count, chunk: expected at least 1, got {count}, {chunk}")
        self.path, self.count, self.chunk, self.facts = path, count, chunk, dict(facts)
        about = {"format": FORMAT, "count": count, "chunk": chunk, "facts": self.facts}
        described = path / ABOUT
        if described.exists():
            if different := differences(read_json(described, "a description of features"), about):
                raise ValueError(
                    f"features: {path} holds those of other images or settings ({'; '.join(different)}); name another "
                    "folder, or remove this one"
                )
        elif path.exists() and set(path.iterdir()) - set(leftovers(path, {ABOUT})):  # begun by a run that was killed
            raise ValueError(f"features: expected a new folder or one with {ABOUT}, got {path} with other things in it")
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(described, about)

    @classmethod
    def named(cls, work: Path, name: str, count: int, facts: Mapping[str, Any], chunk: int = CHUNK) -> FeatureFolder:
        """One in `work`, called `name` and a hash of all that could change its features: others are beside it."""
        key = hashlib.sha256(json.dumps([count, chunk, dict(facts)], sort_keys=True).encode()).hexdigest()[:16]
        plain = re.sub(r"[^\w.-]+", "-", name)[-40:].strip("-.")
        return cls(work / f"{plain}-{key}", count, facts, chunk)

    @property
    def chunks(self) -> list[range]:
        """The images of each file."""
        return [range(i, min(i + self.chunk, self.count)) for i in range(0, self.count, self.chunk)]

    def missing(self) -> list[range]:
        """The images of the files that are still to be written."""
        return [images for images in self.chunks if not self._file(images).exists()]

    def compute(
        self,
        images: Images,
        extractor: Extractor,
        rank: int = 0,
        world: int = 1,
        on_images: Callable[[int], None] | None = None,
    ) -> None:
        """As `compute_features`, of this folder alone."""
        compute_features([(self, extractor)], images, rank, world, on_images)

    def write(self, images: range, features: Sequence[Mapping[str, Tensor]]) -> None:
        """Write those of one file, given piece by piece. Raises ValueError for another number of images."""
        got = sum(len(next(iter(part.values()))) for part in features)
        if got != len(images):
            raise ValueError(f"images: expected {len(images)} from {images.start} on, got {got}")
        together = {name: torch.cat([part[name] for part in features]) for name in features[0]}
        write_atomically(self._file(images), partial(save_file, together))

    def names(self) -> set[str]:
        """What features there are. Raises ValueError where some are missing."""
        self._check_whole()
        return set(read_tensors(self._file(self.chunks[0]), check=bool))

    def parts(self, name: str) -> Iterator[Tensor]:
        """Features `name`, (b, d) float32 file by file. Raises ValueError where some are missing."""
        self._check_whole()
        for chunk in self.chunks:
            tensors = read_tensors(self._file(chunk), check=bool)
            if name not in tensors or len(tensors[name]) != len(chunk):
                raise ValueError(f"features: expected {name!r} of {len(chunk)} images in {self._file(chunk)}")
            yield tensors[name]

    def vectors(self, name: str) -> Tensor:
        """All of them, (count, d) float32, held once."""
        whole = torch.empty(0)
        for images, part in zip(self.chunks, self.parts(name), strict=True):
            if not images.start:
                whole = torch.empty(self.count, *part.shape[1:])
            whole[images.start : images.stop] = part
        return whole

    def moments(self, name: str) -> Moments:
        """Raises ValueError as `parts`, and as `MomentSums` for NaN.

        Sums are of `CHUNK` vectors each, so that not even their last bits depend on how many a file holds.
        """
        sums, held = MomentSums(), torch.empty(0)
        for part in self.parts(name):
            held = torch.cat([held, part]) if len(held) else part
            while len(held) >= CHUNK:
                sums.add(held[:CHUNK])
                held = held[CHUNK:]
        if len(held):
            sums.add(held)
        return sums.moments()

    def _check_whole(self) -> None:
        if left := sum(map(len, self.missing())):
            raise ValueError(f"features: expected those of {self.count} images in {self.path}, {left} are missing")

    def _file(self, chunk: range) -> Path:
        return self.path / f"{chunk.start:08}.safetensors"


def compute_features(
    wanted: Sequence[tuple[FeatureFolder, Extractor]],
    images: Images,
    rank: int = 0,
    world: int = 1,
    on_images: Callable[[int], None] | None = None,
) -> None:
    """Write what is missing in folders of the same images, each with its network, from one pass over those images.

    Of `world` processes that begin together, each writes every world-th file. Files are whole or not there.
    Raises ValueError where `images` gives another number of them, or the folders have other files.
    """
    folders = [folder for folder, _ in wanted]
    if any((folder.count, folder.chunk) != (folders[0].count, folders[0].chunk) for folder in folders):
        raise ValueError("features: expected folders of the same images")
    missing = [{chunk.start for chunk in folder.missing()} for folder in folders]
    for chunk in folders[0].chunks[rank::world]:
        computed: list[tuple[FeatureFolder, Extractor, list[Mapping[str, Tensor]]]] = [
            (*pair, []) for pair, starts in zip(wanted, missing, strict=True) if chunk.start in starts
        ]
        if not computed:
            continue
        for piece in images(chunk.start, chunk.stop):
            pixels = torch.from_numpy(piece.transpose(0, 3, 1, 2).copy())
            for _, extractor, parts in computed:
                parts.append({name: values.float().cpu() for name, values in extractor(pixels).items()})
            if on_images is not None:
                on_images(len(piece))
        for folder, _, parts in computed:
            folder.write(chunk, parts)
