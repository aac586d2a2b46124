"""What all sources of encoded pictures have in common: decoding, leaving samples out, fingerprint and summary."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from alitok_fast.data.checks import require_count
from alitok_fast.data.left_out import UNREADABLE, LeftOut, Reason
from alitok_fast.data.name_table import NameTable
from alitok_fast.data.pictures import PixelGate, UnreadableImageError, check_image, decode_image
from alitok_fast.storage.text import shown

_log = logging.getLogger(__name__)
_SAMPLED, _SAMPLED_BYTES = 64, 1 << 20


class EncodedImages:
    """Encoded pictures by index (an ImageSource). A subclass says where sample `index` is, and what it is called.

    `image_size`, `apply_orientation` and `convert_profile`: as for `read_image`. `left_out` and `summary` say what was
    found and what was not taken. Samples can be left out later, which renumbers the others in their order.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        labels: np.ndarray,
        left_out: LeftOut,
        image_size: int | None = None,
        apply_orientation: bool = True,
        convert_profile: bool = True,
    ) -> None:
        if image_size is not None:
            require_count("image_size", image_size)
        self.name, self.class_names, self.left_out = name, list(class_names), left_out
        self.labels = np.asarray(labels, np.int64)
        self.note = ""  # what else the summary says
        self._rows = np.arange(len(self.labels))
        self._reading = {"apply_orientation": apply_orientation, "convert_profile": convert_profile}
        self._image_size, self._gate = image_size, PixelGate()

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        encoded, name = self.encoded(index), self.location(index)
        return decode_image(encoded, name, image_size=self._image_size, gate=self._gate, **self._reading)

    def encoded(self, index: int) -> Path | bytes:
        """The picture as it is stored: a file, or the bytes of one. UnreadableImageError where they cannot be had."""
        raise NotImplementedError

    def sample_name(self, index: int) -> str:
        """What a skip list calls the sample: the same wherever the data lie."""
        raise NotImplementedError

    def location(self, index: int) -> str:
        """What errors call the sample: where it is."""
        return self.sample_name(index)

    def entries(self) -> Iterator[bytes]:
        """What identifies all samples together: their names, stored sizes and labels, for the fingerprint."""
        raise NotImplementedError

    def keep(self, wanted: np.ndarray, reason: Reason) -> None:
        """Leave out the samples where `wanted` (len,) is False, and count them under `reason`."""
        for index in np.flatnonzero(~wanted):
            self.left_out.add(reason, self.sample_name(int(index)))
        self._rows, self.labels = self._rows[wanted], self.labels[wanted]

    def keep_labelled(self, wrong: dict[Reason, np.ndarray]) -> None:
        """Leave out the samples that have no usable label, for each reason a mask (len,)."""
        for reason, mask in wrong.items():
            self.keep(~mask[self._rows], reason)

    def drop_unreadable(self) -> None:
        """Decode every picture once, in threads; warn about each unreadable one by name, and leave it out."""

        def readable(index: int) -> bool:
            try:
                check_image(self.encoded(index), self.location(index), self._gate)
            except UnreadableImageError as error:
                _log.warning("skipped %s", error)
                return False
            return True

        with ThreadPoolExecutor() as pool:
            self.keep(np.fromiter(pool.map(readable, range(len(self))), bool, len(self)), UNREADABLE)

    def fingerprint(self) -> str:
        """A short hash of the samples' names, sizes and classes, of how they are read, and of the bytes of up to 64."""
        digest = hashlib.sha256(repr((sorted(self._reading.items()), self._image_size, self.class_names)).encode())
        for entry in self.entries():
            digest.update(entry)
        for index in range(0, len(self), max(1, -(-len(self) // _SAMPLED))):
            digest.update(_beginning(self, index))
        return digest.hexdigest()[:16]

    @property
    def summary(self) -> str:
        """What was found and what was left out, in one line."""
        held, classes = len(np.unique(self.labels)), len(self.class_names)
        of = f"{held} of {classes} classes" if held < classes else f"{classes} {'class' if classes == 1 else 'classes'}"
        left = f"; left out: {self.left_out}" if self.left_out.counts else ""
        pictures = "picture" if len(self) == 1 else "pictures"
        return f"{shown(self.name)}: {len(self):,} {pictures} in {of}{self.note}{left}"


class PictureFiles(EncodedImages):
    """Picture files under a folder, by paths relative to it."""

    def __init__(self, root: Path, files: Iterable[str], name: str, *rest, **options) -> None:
        super().__init__(name, *rest, **options)
        self.root, self._files = root, NameTable(files)

    @property
    def paths(self) -> list[Path]:
        return [self.encoded(index) for index in range(len(self))]

    def encoded(self, index: int) -> Path:
        return self.root / self.sample_name(index)

    def sample_name(self, index: int) -> str:
        return self._files[int(self._rows[index])]

    def location(self, index: int) -> str:
        return str(self.encoded(index))

    def entries(self) -> Iterator[bytes]:
        for index, label in enumerate(self.labels):
            entry = (self.sample_name(index), self.encoded(index).stat().st_size, int(label))
            yield repr(entry).encode("utf-8", "surrogateescape")


def _beginning(source: EncodedImages, index: int) -> bytes:
    try:
        encoded = source.encoded(index)
    except UnreadableImageError:  # which its reading will say
        return b""
    if isinstance(encoded, bytes):
        return encoded[:_SAMPLED_BYTES]
    with encoded.open("rb") as file:
        return file.read(_SAMPLED_BYTES)
