"""A whole data set read once: which of its pictures are faulty, unusual, there twice or in two classes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alitok_fast.data.checks import require_count
from alitok_fast.data.encoded import EncodedImages
from alitok_fast.data.faults import KINDS, UNREADABLE_KINDS, Fault, content_digest, picture_faults
from alitok_fast.data.inspection_log import InspectionLog, Seen
from alitok_fast.data.left_out import LOST, WRONG_LABELS, LeftOut
from alitok_fast.data.pictures import UnreadableImageError
from alitok_fast.data.reading import read_ahead
from alitok_fast.data.sources import ImageSource, check_picture, source_fingerprint
from alitok_fast.data.workers import WorkerResults
from alitok_fast.progress import Bar
from alitok_fast.storage.text import shown

BATCH = 64  # pictures that a worker reads at a time
TINY = 32  # pixels


class Finding(NamedTuple):
    """What is the matter with one sample, by the name that a skip list calls it."""

    kind: str
    name: str
    detail: str


@dataclass
class Inspection:
    """What was found: `findings` in the order of the data, and how many pictures and classes there are."""

    data: str
    fingerprint: str
    pictures: int
    classes: int
    findings: list[Finding] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind, in the order of `KINDS`."""
        found = Counter(finding.kind for finding in self.findings)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    @property
    def readable(self) -> bool:
        return not any(kind in self.counts for kind in UNREADABLE_KINDS)

    def to_dict(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "fingerprint": self.fingerprint,
            "pictures": self.pictures,
            "classes": self.classes,
            "readable": self.readable,
            "counts": self.counts,
            "findings": [finding._asdict() for finding in self.findings],
        }


def inspect_source(
    source: ImageSource, log: Path | None = None, workers: int = 0, tiny: int = TINY, progress: bool = True
) -> Inspection:
    """Read every picture of a source once, by `workers` processes (0: in this one), and say what was found.

    `log`: a file that keeps what was seen, from which an interrupted inspection of the same data goes on; remove it
    when its result is safe. Pictures with a side shorter than `tiny` pixels are told. Faults of a source that is not
    encoded pictures (IDX) are only those of its labels and doubles.
    """
    require_count("tiny", tiny, least=0)
    fingerprint = source_fingerprint(source)
    with InspectionLog(log, {"fingerprint": fingerprint, "tiny": tiny}, len(source)) as seen:
        batches = [range(first, min(first + BATCH, len(source))) for first in range(seen.done, len(source), BATCH)]
        with Bar("check", len(source), seen.done, progress) as bar:
            for results in _results(_Inspect(source, tiny), batches, workers):
                seen.add(results)
                bar.advance(by=len(results))
        faults, digests = seen.faults, seen.digests
    found: list[Finding] = list(_left_out(source))
    names = list(source.class_names)
    extra = _doubles(source, digests, names)
    for index, label in enumerate(np.asarray(source.labels)):
        told = [*faults.get(index, []), *extra.get(index, [])]
        if not 0 <= label < len(names):
            told.append(Fault("mislabelled", f"label {label} of {len(names)} classes"))
        found += [Finding(fault.kind, _name(source, index), fault.detail) for fault in told]
    return Inspection(source.name, fingerprint, len(source), len(names), found)


class _Inspect:
    """What is done with one picture, in a worker."""

    def __init__(self, source: ImageSource, tiny: int) -> None:
        self._source, self._tiny = source, tiny

    def __call__(self, index: int) -> Seen:
        if not isinstance(self._source, EncodedImages):
            picture = check_picture(self._source.image(index), index)
            return content_digest(repr(picture.shape).encode() + picture.tobytes()), []
        try:
            encoded = self._source.encoded(index)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's about damaged files, without their names
                return content_digest(encoded), picture_faults(encoded, self._source.location(index), self._tiny)
        except (UnreadableImageError, OSError) as error:
            return b"", [Fault("unreadable", shown(error, limit=300))]


def _results(inspect: _Inspect, batches: list[range], workers: int) -> Iterator[list[Seen]]:
    if require_count("workers", workers, least=0):
        with WorkerResults(inspect, batches, list, workers) as results:
            yield from results
    else:
        yield from read_ahead(batches, inspect, 1)


def _name(source: ImageSource, index: int) -> str:
    return source.sample_name(index) if hasattr(source, "sample_name") else f"image {index}"


def _left_out(source: ImageSource) -> Iterator[Finding]:
    """What was no sample at all, for its label or for being lost."""
    left_out = source.left_out if isinstance(source, EncodedImages) else LeftOut()
    for reason in (*WRONG_LABELS, *LOST):
        for name in left_out.names.get(reason, []):
            detail = left_out.details.get(name, reason[0])
            yield Finding("mislabelled" if reason in WRONG_LABELS else "unreadable", name, detail)


def _doubles(source: ImageSource, digests: Sequence[bytes], names: list[str]) -> dict[int, list[Fault]]:
    """Faults by index of pictures whose bytes are there more than once: in two classes, or in one."""
    known = np.flatnonzero(np.array([len(digest) > 0 for digest in digests], bool))
    if not len(known):
        return {}
    table = np.frombuffer(b"".join(digests), np.dtype(f"V{len(digests[int(known[0])])}"))
    order = np.argsort(table, kind="stable")
    first = np.flatnonzero(np.concatenate([[True], table[order][1:] != table[order][:-1]]))
    faults: dict[int, list[Fault]] = {}
    for group in np.split(known[order], first[1:]):
        if len(group) > 1:
            for index, fault in _group(source, [int(index) for index in group], names):
                faults.setdefault(index, []).append(fault)
    return faults


def _group(source: ImageSource, group: list[int], names: list[str]) -> Iterator[tuple[int, Fault]]:
    labels = [int(source.labels[index]) for index in group]
    if len(set(labels)) > 1:
        classes = " and ".join(repr(shown(names[label])) for label in sorted(set(labels)) if label < len(names))
        yield from ((index, Fault("mislabelled", f"the same bytes are in {classes}")) for index in group)
    seen: dict[int, int] = {}
    for index, label in zip(group, labels, strict=True):
        if label in seen:
            yield index, Fault("duplicate", f"the same bytes as {shown(_name(source, seen[label]), limit=300)}")
        seen.setdefault(label, index)
