"""What an inspection has seen so far, in a file that grows: one line of JSON per block, whole or not counted."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from alitok_fast.data.faults import DIGEST, KINDS, Fault

_log = logging.getLogger(__name__)
Seen = tuple[bytes, list[Fault]]  # the digest of a picture's bytes, empty where there are none, and its faults
_BLOCK, _BLOCK_SECONDS = 1024, 5.0


class InspectionLog:
    """The digests and faults of the first `done` of `count` pictures; with a `path`, those of an earlier run as well.

    `identity`: what decides the result, compared with that of the earlier run, which is begun anew where it differs.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], count: int) -> None:
        self._path, self._identity = path, {"alitok-fast inspection": 1, "count": count, **identity}
        self.digests: list[bytes] = []
        self.faults: dict[int, list[Fault]] = {}
        self._file: BinaryIO | None = None
        self._waiting: list[Seen] = []
        self._logged = 0
        self._written = monotonic()

    @property
    def done(self) -> int:
        return len(self.digests)

    def __enter__(self) -> InspectionLog:
        if self._path is not None:
            whole = self._restored(self._path) if self._path.exists() else 0
            self._file = self._path.open("r+b" if whole else "wb")
            self._file.truncate(whole)
            self._file.seek(whole)
            if not whole:
                self._line(self._identity)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._flush()
            self._file.close()

    def add(self, seen: list[Seen]) -> None:
        """Those of the next pictures."""
        self._keep(seen)
        self._waiting += seen
        if len(self._waiting) >= _BLOCK or monotonic() - self._written > _BLOCK_SECONDS:
            self._flush()

    def _keep(self, seen: list[Seen]) -> None:
        for digest, faults in seen:
            if faults:
                self.faults[self.done] = faults
            self.digests.append(digest)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []  # first: Ctrl-C may come while they are written
        if self._file is not None and waiting:
            entries = [[digest.hex(), faults] for digest, faults in waiting]
            self._line({"first": self._logged, "seen": entries})
            self._logged += len(waiting)
        self._written = monotonic()

    def _line(self, value: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(value).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _restored(self, path: Path) -> int:
        """Take over what a log has; how many of its bytes are whole lines of this inspection."""
        lines = path.read_bytes().split(b"\n")[:-1]
        try:
            if not lines or json.loads(lines[0]) != self._identity:
                _log.warning("%s is of other data or settings: everything is read again", path)
                return 0
            for line in lines[1:]:
                block = json.loads(line)
                if block["first"] != self.done:
                    raise ValueError(f"pictures from {block['first']} on after {self.done}")
                self._keep([_seen(*entry) for entry in block["seen"]])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.digests, self.faults = [], {}
            _log.warning("%s is damaged (%s): everything is read again", path, type(error).__name__)
            return 0
        if self.done > self._identity["count"]:
            _log.warning("%s has more pictures than the data: everything is read again", path)
            self.digests, self.faults = [], {}
            return 0
        self._logged = self.done
        return sum(len(line) + 1 for line in lines)


def is_inspection_log(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(25).startswith(b'{"alitok-fast inspection"')


def _seen(digest: str, faults: list) -> Seen:
    found = [Fault(str(kind), str(detail)) for kind, detail in faults]
    if len(digest) not in (0, 2 * DIGEST) or any(fault.kind not in KINDS for fault in found):
        raise ValueError(digest)
    return bytes.fromhex(digest), found
