"""Progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Counts up to `total` with a line of figures behind; silent when not `enabled` or without a terminal."""

    def __init__(self, title: str, total: int, start: int = 0, enabled: bool = True) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            disable=not enabled,
        )
        self._task = self._progress.add_task(title, total=total, completed=start, figures="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, figures: dict[str, float] | None = None, by: int = 1) -> None:
        fields = {} if figures is None else {"figures": " ".join(f"{k} {v:.4g}" for k, v in figures.items())}
        self._progress.update(self._task, advance=by, **fields)


def tracked(title: str, items: Iterable, enabled: bool = True) -> Iterator:
    """The items of a sized iterable, with a bar."""
    total = len(items) if isinstance(items, Sized) else 0
    with Bar(title, total, enabled=enabled) as bar:
        for item in items:
            yield item
            bar.advance()
