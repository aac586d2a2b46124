"""What the commands of `alitok-fast evaluate` share: networks by name, where they write, how results are printed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from alitok_fast.cli.options import LoadOptions, option
from alitok_fast.storage.text import shown

if TYPE_CHECKING:
    from alitok_fast.evaluation.networks import Network

DEFAULT_NETWORK = "inception"


@dataclass(frozen=True)
class DrawOptions(LoadOptions):
    """A pipeline, where --weights are those of the networks that measure."""

    weights: str = option(
        "ema", "Of a model's checkpoint with averaged (EMA) weights, take 'ema' or 'raw'.", "--model-weights"
    )


@dataclass(frozen=True)
class NetworkOptions:
    """In whose features distances are measured."""

    network: list[str] | None = option(
        None,
        "inception (if not given), dinov2_vitb14, efficientnet_lite0, timm:NAME or hub:REPOSITORY:NAME; repeatable.",
    )
    network_weights: list[str] | None = option(
        None, "File of a network's weights; of several networks NETWORK=FILE, repeatable.", "--weights"
    )

    @property
    def names(self) -> list[str]:
        return self.network or [DEFAULT_NETWORK]

    def load(self, device: str) -> list[Network]:
        """Raises as `alitok_fast.evaluation.networks.load_network`."""
        from alitok_fast.device import check_device, local_device
        from alitok_fast.evaluation.networks import load_network

        files = self._files()
        place = local_device(check_device(device))
        return [load_network(name, files.get(name), place, "--weights") for name in self.names]

    def _files(self) -> dict[str, Path]:
        names = self.names
        files: dict[str, Path] = {}
        for text in self.network_weights or []:
            name, _, file = text.partition("=")
            if not file or name not in names:
                if len(names) > 1:
                    expected = f"NETWORK=FILE with one of {', '.join(map(shown, names))}"
                    raise ValueError(f"weights: expected {expected}, got {shown(text)}")
                name, file = names[0], text
            if name in files:
                raise ValueError(f"weights: expected one file of {name}, got {files[name]} and {file}")
            files[name] = Path(file)
        return files


def seeds_of(text: str) -> list[int]:
    """Of "0,1,2". Raises ValueError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds: expected integers with commas between them, got {shown(text)!r}") from None


def check_result(out: Path | None, kind: str, force: bool) -> None:
    """That a result can be written at `out`: over one of ours of the same `kind`, never over another file unasked."""
    from alitok_fast.storage.files import read_json

    if out is None:
        return
    if out.suffix != ".json":
        raise ValueError(f"out: expected a file ending in .json, got {out}")
    if force or not out.exists():
        return
    try:
        ours = read_json(out).get("format") == kind
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(f"out: {out} is there, and holds no result of this command; choose another or --force")


@contextlib.contextmanager
def working_folder(work: Path | None, out: Path | None, rank: int, world: int) -> Iterator[Path]:
    """Where features are kept, for this command alone: `work`, which stays; else one beside `out`, which goes once the
    block ends well; else a temporary one."""
    from alitok_fast.pipelines.bulk import only_writer

    if work is None and out is None:
        if world > 1:
            raise ValueError(f"work: expected a folder (or --out) for {world} processes together, got none")
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    path = work if work is not None or out is None else out.with_name(out.name + ".work")
    assert path is not None
    with only_writer(path, rank):
        path.mkdir(parents=True, exist_ok=True)
        yield path
        if work is None and rank == 0:
            _remove_features(path)


def _remove_features(path: Path) -> None:
    """Those in and under a folder, and the folder where nothing else is in it."""
    from alitok_fast.evaluation.feature_folder import ABOUT

    for about in list(path.rglob(ABOUT)):
        shutil.rmtree(about.parent)
    with contextlib.suppress(OSError):
        path.rmdir()


def table(result: Mapping[str, Any]) -> list[str]:
    """A result of `measure_samples` for people, then what makes it incomparable."""
    sets = result["sets"]
    lines = [f"{result['count']:,} images of {result['size']} pixels: {', '.join(shown(one['name']) for one in sets)}"]
    for network, measures in result["measures"].items():
        about = result["references"][network]
        lines.append(f"{shown(network)}, against {about['kind']}'s statistics {about['sha256'][:12]}")
        lines += measured(measures)
    return lines + warnings(result["doubts"])


def measured(measures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each measure."""
    width = max(map(len, measures))
    lines = []
    for name, found in measures.items():
        text = f"  {name:{width}}  {found['mean']:.6g}"
        if "interval" in found:
            text += f" +- {found['interval']:.3g} (95%; standard deviation {found['std']:.3g})"
        elif "std_of_parts" in found:
            text += f" (standard deviation of its parts {found['std_of_parts']:.3g})"
        lines.append(text)
    return lines


def say_result(lines: Sequence[str], out: Path | None) -> None:
    """Print a result, and where it was written."""
    for line in lines:
        typer.echo(line)
    if out is not None:
        typer.echo(f"wrote {out}")


def warnings(doubts: Sequence[str]) -> list[str]:
    return [f"warning: {line}" for line in doubts]
