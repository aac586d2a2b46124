"""`alitok-fast data ...`: what a data set holds, before it is trained on. Mounted by alitok_fast/cli/app.py."""

from __future__ import annotations

import dataclasses
import json as json_lines
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alitok_fast.cli.options import MaybeInt, MaybePath, MaybeTexts, Progress, option, with_options
from alitok_fast.storage.text import shown

if TYPE_CHECKING:
    from alitok_fast.data.inspection import Inspection

NO_SPLITS = "train"  # what data without splits are opened as
HELP = """Look at a data set before it is trained on.

\b
Example:
  alitok-fast data check --data PHOTOS --out bad.txt
"""
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=HELP)


@dataclass(frozen=True)
class SourceOptions:
    """Where pictures and their classes come from."""

    data: str = option(
        ...,
        "Folder of class folders, IDX files or shards; list (.txt, .csv); shards (x-{000..146}.tar); hf:NAME[:SPLIT].",
    )
    split: str = option("train", "IDX files: train or test. Otherwise a split of the data, such as val.")
    skip_list: Path | None = option(None, "List of samples to leave out, by `alitok-fast data check --out`.")
    root: Path | None = option(None, "Of a list: the folder of its pictures; the list's own, if not given.")
    labels: Path | None = option(None, "List of the classes of a split without class folders (ImageNet's val).")
    class_names: Path | None = option(None, "File that names the classes, one a line, or 'wnid name' in each.")
    image_column: str | None = option(None, "Column (datasets) or suffix (shards) of the pictures.")
    label_column: str | None = option(None, "Column of the labels; of shards cls, txt, json or json.KEY; 'none'.")
    index_folder: Path | None = option(None, "Where the index of shards is kept; beside them, if not given.")

    def open(self, report: Callable[[str], object], **reading: Any) -> Any:
        """The source, for training, by `alitok_fast.data.open_source`; `reading` are its other arguments."""
        from alitok_fast.data import open_source

        return open_source(self.data, self.split, report=report, skip_list=self.skip_list, **self._places(), **reading)

    def find(self) -> Any:
        """The source with all that is wrong with it, by `alitok_fast.data.find_source`, but for the skip list."""
        from alitok_fast.data import find_source, skip_samples

        source = find_source(self.data, self.split, **self._places())
        if self.skip_list is not None:
            skip_samples(source, self.skip_list)
        return source

    def _places(self) -> dict[str, Any]:
        apart = ("data", "split", "skip_list")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in apart}


def first_split(splits: Sequence[str], opened: Callable[[str], Any]) -> Any:
    """What `opened` gives for the first of these splits that the data have; raises its last error where none is."""
    for split in splits:
        try:
            return opened(split)
        except ValueError as error:
            if not str(error).startswith("split:") or split == splits[-1]:
                raise


@app.command("check")
@with_options(source=SourceOptions)
def check(
    source: Any,
    out: Annotated[
        MaybePath, typer.Option(help="Skip list to write; an interrupted check goes on from beside it.")
    ] = None,
    skip: Annotated[MaybeTexts, typer.Option(help="Kind of fault to put on the list; repeatable.")] = None,
    tiny: Annotated[int, typer.Option(help="Sides shorter than this are told, in pixels.", min=0)] = 32,
    workers: Annotated[
        MaybeInt, typer.Option(help="Processes that read pictures; one per core, if not given.", min=0)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is no skip list.")] = False,
    progress: Progress = True,
) -> None:
    """Read every picture once and name each that is unreadable, truncated, animated, CMYK, 16-bit, transparent, tiny,
    there twice (the same bytes), or mislabelled (the same bytes in two classes, or a label out of range).

    Exit status 0 when all can be read, 1 otherwise. With --out, those that are unreadable, truncated or mislabelled
    (or of the kinds that --skip names) become a list for --skip-list.

    \b
    Examples:
      alitok-fast data check --data photos/
      alitok-fast data check --data 'imagenet-{000000..000146}.tar' --out bad.txt --workers 8
      alitok-fast data check --data photos/ --json > report.json
    """
    from alitok_fast.data.inspection_files import LEFT_BY_DEFAULT, check_data

    found = source.find()
    typer.echo(found.summary, err=json)
    report, chosen = check_data(found, out, skip or LEFT_BY_DEFAULT, workers, tiny, progress, force)
    if json:
        written = {"skip_list": None if out is None else str(out), "skipped": chosen}
        typer.echo(json_lines.dumps({**report.to_dict(), **written}, indent=1))
    else:
        _print(report)
    if out is not None:
        typer.echo(f"wrote {out}: {chosen:,} {'sample' if chosen == 1 else 'samples'} to leave out", err=json)
    if not report.readable:
        raise typer.Exit(1)


def _print(report: Inspection) -> None:
    for kind, name, detail in report.findings:
        typer.echo(f"{kind}\t{shown(name, limit=4096)}\t{shown(detail, limit=400)}")
    counts = ", ".join(f"{count:,} {kind}" for kind, count in report.counts.items())
    typer.echo(f"{report.pictures:,} pictures: {counts or 'nothing found'}")
