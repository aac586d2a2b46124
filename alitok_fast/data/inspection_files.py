"""An inspection with its files: the skip list that it writes, and the log from which it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

from alitok_fast.data.checks import require_choice
from alitok_fast.data.faults import KINDS
from alitok_fast.data.inspection import TINY, Inspection, inspect_source
from alitok_fast.data.inspection_log import is_inspection_log
from alitok_fast.data.reading import default_processes
from alitok_fast.data.skip_list import is_skip_list, write_skip_list
from alitok_fast.data.sources import ImageSource
from alitok_fast.storage.files import locked

LEFT_BY_DEFAULT = ("unreadable", "truncated", "mislabelled")


def check_data(
    source: ImageSource,
    out: Path | None = None,
    kinds: Collection[str] = LEFT_BY_DEFAULT,
    workers: int | None = None,
    tiny: int = TINY,
    progress: bool = True,
    force: bool = False,
) -> tuple[Inspection, int]:
    """Inspect a source, and write the samples with a fault of `kinds` to the skip list `out`; how many there are.

    `workers` processes read (`default_processes` if not given; 0: this one). While it runs, what was seen is
    beside `out`, in out.progress, and a further run of the same data goes on from there. Raises ValueError where `out`
    or that file is somebody else's (`force` writes over `out`), or another process is writing it.
    """
    for kind in kinds:
        require_choice("skip", kind, KINDS)
    workers = default_processes() if workers is None else workers
    if out is None:
        found = inspect_source(source, None, workers, tiny, progress)
        return found, len(_chosen(found, kinds))
    log = out.with_name(f"{out.name}.progress")
    _require_ours(out, log, force)
    with locked(out.with_name(f".{out.name}.lock"), out):
        found = inspect_source(source, log, workers, tiny, progress)
        chosen = _chosen(found, kinds)
        write_skip_list(out, source.name, chosen)
        with contextlib.suppress(FileNotFoundError):
            log.unlink()
    return found, len(chosen)


def _chosen(found: Inspection, kinds: Collection[str]) -> list[tuple[str, str]]:
    """(kind, name) of each sample to leave out, once."""
    chosen = {finding.name: finding.kind for finding in reversed(found.findings) if finding.kind in kinds}
    return [(kind, name) for name, kind in reversed(chosen.items())]


def _require_ours(out: Path, log: Path, force: bool) -> None:
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"out: expected a file in a folder that exists, got {out}")
    if out.exists() and not force and not is_skip_list(out):
        raise ValueError(f"out: {out} is there, and is no skip list; choose another or --force")
    if log.exists() and not is_inspection_log(log):
        raise ValueError(f"out: {log} is there, and no check has written it; choose another name")
