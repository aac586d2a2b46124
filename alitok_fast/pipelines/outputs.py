"""Where a large run writes its images: a folder of PNGs, or one npz. It may be killed at any moment and go on later."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from alitok_fast.storage.files import leftovers
from alitok_fast.storage.images import is_whole_png, write_image, write_npy, write_npz

MANIFEST_NAME = "manifest.json"
PIECES_SUFFIX = ".pieces"
ARCHIVE_NAME = "archive.npz"
OTHER_ARCHIVES = {".npy", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".h5", ".pt", ".safetensors"}


def output_at(path: Path, total: int, side: int) -> PngFolder | NpzFile:
    """For `total` images of `side` x `side` pixels: an npz where `path` ends so, else a folder of PNGs."""
    return (NpzFile if path.suffix.lower() == ".npz" else PngFolder)(path, total, side)


@dataclass(frozen=True)
class PngFolder:
    """A folder of PNGs `<id>.png`, with the manifest beside them."""

    path: Path
    total: int
    side: int
    complete = False  # PNGs are looked for one by one

    def check(self) -> None:
        suffix = self.path.suffix.lower()
        if suffix in OTHER_ARCHIVES or suffix in Image.registered_extensions():
            raise ValueError(f"output: expected a folder or a file ending in .npz, got {self.path}")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output: expected a folder, got the file {self.path}")

    @property
    def work(self) -> Path:
        return self.path

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST_NAME

    def files(self, ids: Sequence[int]) -> list[Path]:
        """The files that hold these images."""
        digits = len(str(self.total - 1))
        return [self.path / f"{i:0{digits}d}.png" for i in ids]

    def in_the_way(self) -> list[str]:
        """Names in the folder that a run which begins there would overwrite."""
        return sorted({file.name for file in self.files(range(self.total))} & set(os.listdir(self.path)))

    def holds(self, ids: Sequence[int]) -> bool:
        return all(is_whole_png(file, self.side) for file in self.files(ids))

    def write(self, ids: Sequence[int], pixels: np.ndarray) -> None:
        for file, image in zip(self.files(ids), pixels, strict=True):
            write_image(file, image)

    def publish(self, batches: Sequence[range], labels: Sequence[int]) -> None:
        """The images are where they belong; this removes what killed processes had half written."""
        names = {MANIFEST_NAME, *(file.name for file in self.files(range(self.total)))}
        for file in leftovers(self.path, names):
            file.unlink()

    def pictures(self, ids: Sequence[int]) -> list[np.ndarray]:
        return [np.asarray(Image.open(file)) for file in self.files(ids)]


@dataclass(frozen=True)
class NpzFile:
    """One npz and its manifest `<name>.npz.json`, made of pieces in the folder `<name>.npz.pieces` beside it."""

    path: Path
    total: int
    side: int

    def check(self) -> None:
        if self.path.is_dir():
            raise ValueError(f"output: expected a file, got the folder {self.path}")
        if self.complete and not self.manifest.exists():
            raise ValueError(f"output: {self.path} exists without {self._final_manifest.name}; choose another name")

    @property
    def complete(self) -> bool:
        return self.path.exists()

    @property
    def work(self) -> Path:
        return self.path.with_name(self.path.name + PIECES_SUFFIX)

    @property
    def manifest(self) -> Path:
        """Among the pieces, until it is the last thing to move to its final place."""
        begun = self.work / MANIFEST_NAME
        return begun if begun.exists() or not self._final_manifest.exists() else self._final_manifest

    @property
    def _final_manifest(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def piece(self, ids: Sequence[int]) -> Path:
        return self.work / f"{ids[0]:0{len(str(self.total - 1))}d}.npy"

    def in_the_way(self) -> list[str]:
        """Names in the folder that are not a run's: it is removed in the end, so all of them would be lost."""
        begun = {file.name for file in leftovers(self.work, {MANIFEST_NAME})}
        return sorted(set(os.listdir(self.work)) - begun)

    def holds(self, ids: Sequence[int]) -> bool:
        try:
            piece = np.load(self.piece(ids), mmap_mode="r")
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or not whole as files of ours appear
            return False
        shape = len(ids), self.side, self.side, 3
        return isinstance(piece, np.ndarray) and piece.dtype == np.uint8 and piece.shape == shape

    def write(self, ids: Sequence[int], pixels: np.ndarray) -> None:
        write_npy(self.piece(ids), pixels)

    def publish(self, batches: Sequence[range], labels: Sequence[int]) -> None:
        """Put the pieces together and remove them; what a kill interrupts, the next call finishes."""
        if not self.complete:
            for file in leftovers(self.work, {ARCHIVE_NAME}):  # they are large
                file.unlink()
            archive, shape = self.work / ARCHIVE_NAME, (self.total, self.side, self.side, 3)
            write_npz(archive, (np.load(self.piece(ids)) for ids in batches), shape, np.array(labels))
            archive.replace(self.path)
        if self.work.exists():
            if self.manifest != self._final_manifest:
                self.manifest.replace(self._final_manifest)
            shutil.rmtree(self.work)

    def pictures(self, ids: Sequence[int]) -> list[np.ndarray]:
        with np.load(self.path) as arrays:
            return list(arrays["arr_0"][list(ids)])
