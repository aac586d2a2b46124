"""Many images: balanced classes, any number of processes, resumable, one manifest.

The images are numbered; image i has the label `labels[i]` and the noise of id i, so what it shows does not depend on
which process samples it. Batches have fixed borders, so that not even rounding depends on it: batch b belongs to
process b % world, and is done when its files are there. Files appear whole, by renaming; a killed run goes on from
where it was.
The manifest says how the images were made. It is written with the first batch, once all settings have proved to work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch.distributed as dist

from alitok_fast.inference.params import SamplingParams
from alitok_fast.pipelines.outputs import MANIFEST_NAME, output_at
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.storage.files import differences, locked, read_json, weights_fingerprint, write_json

Made = TypeVar("Made")
MOST_IMAGES = 100_000_000
# Where and when, not what: a run may be resumed on another device, with the same weights from another path.
FREE_KEYS = ("device", "versions", "model")


def balanced_labels(classes: Sequence[int], images: int | None, per_class: int | None) -> list[int]:
    """One label per image, with every class equally often: image i has `classes[i % len(classes)]`.

    So each run of `len(classes)` images holds every class once, as do the parts of 5,000 on which ADM's evaluator
    computes the Inception Score. Give `per_class`, or the total `images`, or both if they agree; with neither, each
    class has one image.
    """
    if not classes:
        raise ValueError("labels: expected at least one class, got none")
    twice = [label for label in dict.fromkeys(classes) if classes.count(label) > 1]
    if twice:
        raise ValueError(f"labels: expected each class once, got {twice[0]} again; per_class asks for more of each")
    if per_class is not None and not 1 <= per_class <= MOST_IMAGES // len(classes):
        expected = f"1 to {MOST_IMAGES // len(classes)}"
        raise ValueError(f"per_class: expected {expected}, got {per_class}")
    if images is not None:
        if images > MOST_IMAGES:
            raise ValueError(f"num_images: expected at most {MOST_IMAGES}, got {images}")
        if images < 1 or images % len(classes):
            raise ValueError(f"num_images: expected a multiple of the {len(classes)} classes, got {images}")
        if per_class is not None and per_class * len(classes) != images:
            raise ValueError(f"num_images: expected {per_class * len(classes)}, per_class x classes, got {images}")
        per_class = images // len(classes)
    return list(classes) * (per_class or 1)


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """This process's rank and the number of processes: under torchrun it joins the others, else they are 0 and 1.

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


@contextlib.contextmanager
def only_writer(output: Path, rank: int = 0) -> Iterator[None]:
    """Inside the block no other command may write to `output`: the first process holds a lock beside it.

    Raises ValueError where another command holds it.
    """
    if rank:
        yield
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output.with_name(f".{output.name}.lock"), output):
        yield


def wait_for_all(world: int) -> None:
    """Go on when every process has come here."""
    if world > 1:
        dist.barrier()


def first_says(make: Callable[[], Made], rank: int, world: int) -> Made:
    """What the first process makes, in all of them. Where it fails, the others end with it."""
    held = [make() if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(held, 0)
    return cast(Made, held[0])


def origin_of_images(pipe: Pipeline, params: SamplingParams) -> dict[str, Any]:
    """What determines a picture besides its label and its id, with a hash of the weights, as JSON values."""
    return {
        **pipe.metadata(params),
        "generator_fingerprint": weights_fingerprint(pipe.generator.state_dict()),
        "tokenizer_fingerprint": weights_fingerprint(pipe.tokenizer.state_dict()),
    }


class BulkRun:
    """Samples `labels`, one image per label, into `output`; this process is number `rank` of `world`."""

    def __init__(
        self,
        pipe: Pipeline,
        labels: Sequence[int],
        output: Path,
        params: SamplingParams,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Nothing is written yet.

        With `world` > 1 every process of the torch.distributed group creates its own, in the same way.
        Raises ValueError where `output` holds another run or other files, or is no folder or npz file.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.pipe, self.labels = pipe, list(labels)
        self.params = params.resolved(pipe.generator.config)
        self.batch_size, self.rank, self.world = batch_size, rank, world
        side = pipe.tokenizer.config.image_size
        self.output = output_at(Path(output), len(self.labels), side)
        self.manifest = {
            **origin_of_images(pipe, self.params),
            "num_images": len(self.labels),
            "image_size": side,
            "batch_size": batch_size,
            "labels": self.labels,
        }
        if rank == 0:
            self._look()
        self._wait()  # before anybody writes
        self.mine = [ids for ids in self._missing() if ids.start // batch_size % world == rank]

    def _look(self) -> None:
        """See that the output can be begun, or is of the same images."""
        self.output.check()
        if self.output.manifest.exists():
            self._compare()
        elif self.output.work.is_dir() and (taken := self.output.in_the_way()):
            raise ValueError(
                f"output: {self.output.work} holds {taken[0]}, but no {MANIFEST_NAME} of a run; choose another name"
            )

    def _compare(self) -> None:
        file = self.output.manifest
        different = differences(read_json(file, "the manifest of a run"), self.manifest, FREE_KEYS)
        if different:
            raise ValueError(f"output: expected settings as in {file}, got others: {'; '.join(different)}")

    def _begin(self) -> None:
        """Write the manifest, unless it is there: by another process, or since the run is resumed."""
        self.output.work.mkdir(parents=True, exist_ok=True)
        if self.output.manifest.exists():
            self._compare()
        else:
            write_json(self.output.manifest, self.manifest)

    def _wait(self) -> None:
        wait_for_all(self.world)

    @property
    def batches(self) -> list[range]:
        """The image numbers of each batch."""
        total, size = len(self.labels), self.batch_size
        return [range(start, min(start + size, total)) for start in range(0, total, size)]

    def _missing(self) -> list[range]:
        """The batches that nobody has finished yet."""
        return [] if self.output.complete else [ids for ids in self.batches if not self.output.holds(ids)]

    @property
    def share(self) -> int:
        """The number of images that this process had to sample when it began."""
        return sum(map(len, self.mine))

    def sample(self, on_batch: Callable[[int], None] | None = None) -> None:
        """Sample this process's share; files are written while the next batch is sampled.

        `on_batch` is called with the number of images of each batch, once it is sampled.
        """
        with ThreadPoolExecutor(max_workers=1) as writer:
            writing: Future | None = None
            for ids in self.mine:
                samples = self.pipe([self.labels[i] for i in ids], self.params, image_ids=ids)
                if writing is None:
                    self._begin()
                else:
                    writing.result()  # an error while writing stops the run
                writing = writer.submit(self.output.write, ids, samples.pixels)
                if on_batch is not None:
                    on_batch(len(ids))
            if writing is not None:
                writing.result()

    def finish(self) -> None:
        """Wait for every process; then put the pieces of an npz together, and remove what kills left behind.

        Raises RuntimeError when images are missing.
        """
        self._wait()
        if self.rank == 0:
            left = sum(map(len, self._missing()))
            if left:
                raise RuntimeError(f"output: expected {len(self.labels)} images, {left} are missing; run again")
            self.output.publish(self.batches, self.labels)
        self._wait()

    def pictures(self, ids: Sequence[int]) -> list[np.ndarray]:
        """These images of the finished run, (H, W, 3) uint8."""
        return self.output.pictures(ids)
