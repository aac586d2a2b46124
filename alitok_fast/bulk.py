"""Many images: balanced classes, any number of processes, resumable, one manifest.

The images are numbered; image i has the label `labels[i]` and the noise of id i, so what it shows does not depend on
who draws it. They are drawn in batches of fixed borders, so that even rounding does not: batch b is drawn by process
b % world, and is done when its files are there. Files appear whole, by renaming; a killed run goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image

from alitok_fast.checkpoint import write_atomically
from alitok_fast.images import write_image, write_npz
from alitok_fast.pipeline import Pipeline

MANIFEST_NAME = "manifest.json"
PIECES_SUFFIX = ".pieces"
# Where and when, not what: a run may be resumed on another device.
_FREE_KEYS = ("device", "versions", "model")


def balanced_labels(classes: Sequence[int], images: int | None, per_class: int | None) -> list[int]:
    """A label for each image, class after class, every class equally often.

    Give `per_class`, or `images` in all, or both where they agree; neither means one a class.
    """
    if not classes:
        raise ValueError("labels: expected at least one class, got none")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class: expected at least 1, got {per_class}")
    if images is not None:
        if images < 1 or images % len(classes):
            raise ValueError(f"num_images: expected a multiple of the {len(classes)} classes, got {images}")
        if per_class is not None and per_class * len(classes) != images:
            raise ValueError(f"num_images: expected {per_class * len(classes)}, per_class x classes, got {images}")
        per_class = images // len(classes)
    return [label for label in classes for _ in range(per_class or 1)]


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """This process's rank and their number: under torchrun, joined to the others; else 0 and 1.

    The processes share nothing but barriers, for which gloo serves on every device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # the first to finish waits for the last
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """The name "cuda" becomes this process's own under torchrun."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@dataclass(frozen=True)
class Output:
    """Where images go: a folder of PNGs `<id>.png`, or one npz file, built from pieces beside it."""

    path: Path

    @property
    def npz(self) -> bool:
        return self.path.suffix == ".npz"

    @property
    def complete(self) -> bool:
        """Whether an npz is there; PNGs are looked for one by one."""
        return self.npz and self.path.exists()

    def check(self) -> None:
        if self.path.suffix and not self.npz:
            raise ValueError(f"output: expected a folder or a file ending in .npz, got {self.path}")
        if not self.npz and self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output: expected a folder, got the file {self.path}")

    @property
    def work(self) -> Path:
        """Folder in which batches land, and the manifest of a run under way."""
        return self.path.with_name(self.path.name + PIECES_SUFFIX) if self.npz else self.path

    @property
    def manifest(self) -> Path:
        return self.path.with_suffix(".json") if self.npz else self.path / MANIFEST_NAME

    def files(self, ids: Sequence[int], total: int) -> list[Path]:
        """The files that hold these images."""
        digits = len(str(total - 1))
        if self.npz:
            return [self.work / f"{ids[0]:0{digits}d}.npy"]
        return [self.work / f"{i:0{digits}d}.png" for i in ids]

    def write(self, ids: Sequence[int], total: int, images: Sequence[Image.Image]) -> None:
        files = self.files(ids, total)
        if self.npz:
            stacked = np.stack([np.asarray(image) for image in images])
            write_atomically(files[0], lambda temporary: _save_array(temporary, stacked))
        else:
            for file, image in zip(files, images, strict=True):
                write_image(file, image)


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, numpy would append a suffix to it
        np.save(file, array)


class BulkRun:
    """Drawing `labels`, one image each, into `output`; this process is number `rank` of `world`."""

    def __init__(
        self,
        pipe: Pipeline,
        labels: Sequence[int],
        output: Path,
        settings: dict[str, Any],
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`settings` as returned by `Pipeline.settings`.

        With `world` > 1 every process of the torch.distributed group creates its own, in the same way.
        Raises ValueError where `output` holds another run, or is no folder or npz file.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.pipe, self.labels, self.settings = pipe, list(labels), settings
        self.output, self.batch_size, self.rank, self.world = Output(Path(output)), batch_size, rank, world
        self.manifest = {
            **pipe.metadata(settings),
            "num_images": len(self.labels),
            "image_size": pipe.tokenizer.config.image_size,
            "batch_size": batch_size,
            "labels": self.labels,
        }
        if rank == 0:
            self._begin()
        self._wait()

    def _begin(self) -> None:
        """Write the manifest, or see that the one that is there speaks of the same images."""
        output = self.output
        output.check()
        file = output.manifest if output.complete else output.work / MANIFEST_NAME
        if output.complete and not file.exists():
            raise ValueError(f"output: {output.path} exists without {file.name}; choose another name")
        if not file.exists():
            output.work.mkdir(parents=True, exist_ok=True)
            write_json(file, self.manifest)
            return
        before = json.loads(file.read_text())
        for key in self.manifest.keys() - set(_FREE_KEYS):
            if before.get(key) != self.manifest[key]:
                change = "other labels" if key == "labels" else f"{before.get(key)!r}, now {self.manifest[key]!r}"
                raise ValueError(f"output: expected settings as in {file}, got another {key}: {change}")

    def _wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    @property
    def batches(self) -> list[range]:
        """The image numbers of each batch."""
        total, size = len(self.labels), self.batch_size
        return [range(start, min(start + size, total)) for start in range(0, total, size)]

    @property
    def missing(self) -> list[range]:
        """The batches that nobody has finished yet."""
        if self.output.complete:
            return []
        total = len(self.labels)
        return [ids for ids in self.batches if not all(file.exists() for file in self.output.files(ids, total))]

    @property
    def mine(self) -> list[range]:
        """The missing batches that fall to this process."""
        return [ids for ids in self.missing if ids.start // self.batch_size % self.world == self.rank]

    @property
    def share(self) -> int:
        """The number of images that this process has still to draw."""
        return sum(map(len, self.mine))

    def draw(self, on_batch: Callable[[int], None] | None = None) -> None:
        """Draw this process's share; files are written while the next batch is drawn.

        `on_batch` is called with the number of images of each batch, once it is drawn.
        """
        with ThreadPoolExecutor(max_workers=1) as writer:
            writing: Future | None = None
            for ids in self.mine:
                samples = self.pipe([self.labels[i] for i in ids], image_ids=ids, **self.settings)
                if writing is not None:
                    writing.result()  # an error while writing stops the run
                writing = writer.submit(self.output.write, ids, len(self.labels), samples.images)
                if on_batch is not None:
                    on_batch(len(ids))
            if writing is not None:
                writing.result()

    def finish(self) -> None:
        """Wait for every process; then put the pieces of an npz together. PNGs need nothing more.

        Raises RuntimeError when images are missing.
        """
        self._wait()
        if self.rank == 0:
            left = sum(map(len, self.missing))
            if left:
                raise RuntimeError(f"output: expected {len(self.labels)} images, {left} are missing; run again")
            if self.output.npz and not self.output.complete:
                self._assemble()
        self._wait()

    def _assemble(self) -> None:
        side, total = self.manifest["image_size"], len(self.labels)
        pieces = [self.output.files(ids, total)[0] for ids in self.batches]
        write_json(self.output.manifest, self.manifest)
        write_npz(self.output.path, (np.load(piece) for piece in pieces), (total, side, side, 3), np.array(self.labels))
        shutil.rmtree(self.output.work)

    def pictures(self) -> list[np.ndarray]:
        """All images of the finished run, (H, W, 3) uint8, in order."""
        if self.output.npz:
            with np.load(self.output.path) as arrays:
                return list(arrays["arr_0"])
        files = self.output.files(range(len(self.labels)), len(self.labels))
        return [np.asarray(Image.open(file)) for file in files]


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write indented JSON, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(values, indent=1) + "\n"))
