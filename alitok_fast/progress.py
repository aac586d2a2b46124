"""Progress on standard error: a bar on a terminal, plain lines where there is none (nohup, slurm, a log file)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

LINE_SECONDS = 30  # between plain lines, at least


class Bar:
    """Counts up to `total` (0: unknown) with the time left and the last known figures; silent when not `enabled`.

    The speed is the mean since the beginning: a batch may take longer than the window of rich's own estimate.
    """

    def __init__(self, title: str, total: int, start: int = 0, enabled: bool = True) -> None:
        console = Console(stderr=True)
        bar = console.is_interactive or console.is_jupyter
        self._title, self._total, self._start, self._done = title, total, start, start
        self._begun = self._line = monotonic()
        self._ends: float | None = None
        self._plain = enabled and not bar
        self._figures: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _TimeLeft(self),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not (enabled and bar),
        )
        self._task = self._progress.add_task(title, total=total, completed=start, figures="")

    def __enter__(self) -> Bar:
        if not self._progress.disable:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._progress.disable:  # rich before 14.1 ends with an empty line even so
            self._progress.stop()

    def advance(self, figures: dict[str, float] | None = None, by: int = 1) -> None:
        self._done += by
        now, count = monotonic(), self._done - self._start
        self._ends = now + (now - self._begun) / count * (self._total - self._done) if count and self._total else None
        self._figures |= figures or {}
        text = " ".join(f"{k} {v:.4g}" for k, v in self._figures.items())
        self._progress.update(self._task, advance=by, figures=text)
        if self._plain and now - self._line >= LINE_SECONDS:
            self._line = now
            of = f"{self._done}/{self._total}" if self._total else str(self._done)
            parts = [of, f"{count / (now - self._begun):.3g}/s", f"{self.left} left" if self._ends else "", text]
            print(f"{self._title}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)

    @property
    def left(self) -> str:
        """Time until the end as H:MM:SS, dashes while it is unknown."""
        if self._ends is None:
            return "-:--:--"
        minutes, seconds = divmod(max(0, round(self._ends - monotonic())), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class _TimeLeft(ProgressColumn):
    max_refresh = 0.5

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar

    def render(self, task: Task) -> Text:
        return Text(self._bar.left, style="progress.remaining")


def tracked(title: str, items: Iterable, enabled: bool = True) -> Iterator:
    """The items of a sized iterable, with a bar."""
    total = len(items) if isinstance(items, Sized) else 0
    with Bar(title, total, enabled=enabled) as bar:
        for item in items:
            yield item
            bar.advance()
