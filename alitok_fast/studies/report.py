"""The alignment study's table and figure, from its results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from alitok_fast.evaluation.intervals import spread
from alitok_fast.models.pretrained import library
from alitok_fast.storage.files import write_atomically

NORMAL = 1.96  # standard errors on each side of a 95% interval


@dataclass(frozen=True)
class Measure:
    """A number of a row: `place` in its result, its title, digits in the table, and by what it is multiplied there.

    `own_error`: whether the result has its standard error, under the same name with `_error`.
    """

    place: tuple[str, ...]
    title: str
    digits: int
    factor: float = 1
    own_error: bool = False


class Value(NamedTuple):
    """Of a measure, as the table has it: the mean over seeds, and the half-width of its 95% interval or None."""

    mean: float
    half: float | None


TRAIN_ACCURACY = Measure(("train", "accuracy"), "AR accuracy, training, %", 1, 100)
ACCURACY = Measure(("test", "accuracy"), "AR accuracy, test, %", 1, 100)
RECONSTRUCTED = Measure(("reconstruction", "distance"), "distance of reconstructions", 2, own_error=True)
UNGUIDED = Measure(("generation", "unguided", "feature_distance"), "distance of samples, unguided", 2, own_error=True)
GUIDED = Measure(("generation", "guided", "feature_distance"), "distance of samples, guided", 2, own_error=True)
MEASURES = (
    TRAIN_ACCURACY,
    ACCURACY,
    Measure(("test", "loss"), "AR loss, test, nats per token", 3),
    Measure(("test", "bits_per_image"), "bits per image, test", 0),
    Measure(("reconstruction", "codebook_usage"), "codes used, %", 1, 100),
    Measure(("reconstruction", "codebook_perplexity"), "codebook perplexity", 0),
    Measure(("reconstruction", "psnr"), "PSNR, dB", 2),
    RECONSTRUCTED,
    UNGUIDED,
    GUIDED,
    Measure(("generation", "guided", "class_accuracy"), "class as asked, guided, %", 1, 100, own_error=True),
)
PAPER = ("AR accuracy, training, %", "gFID", "rFID")


def value_of(measure: Measure, results: Sequence[Mapping[str, Any]]) -> Value:
    """Over the results of one row, a result per seed: with several, Student's interval of their mean; with one, 1.96
    standard errors of its images where it has them."""
    found = [_at(result, measure.place) for result in results]
    mean, _, half = spread(found)
    if half is None and measure.own_error:
        half = NORMAL * _at(results[0], (*measure.place[:-1], f"{measure.place[-1]}_error"))
    return Value(measure.factor * mean, None if half is None else measure.factor * half)


def by_row(results: Sequence[Mapping[str, Any]], order: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """The results of each row, the rows as in `order` and others after them."""
    names = dict.fromkeys([*order, *(result["row"] for result in results)])
    grouped = {name: [result for result in results if result["row"] == name] for name in names}
    return {name: found for name, found in grouped.items() if found}


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]], judge: Mapping[str, float]) -> str:
    """As Markdown: a line per measure, a column per row of the study; below it the paper's numbers."""
    lines = [
        ["", *(found[0]["title"] for found in rows.values())],
        ["---", *("---" for _ in rows)],
        ["tokens", *(str(found[0]["tokens"]) for found in rows.values())],
        *([m.title, *(_shown(value_of(m, found), m.digits) for found in rows.values())] for m in MEASURES),
    ]
    papers = [found[0].get("paper") or (None, None, None) for found in rows.values()]
    if any(number is not None for paper in papers for number in paper):
        lines += [
            [f"*the paper's B: {title}*", *("" if paper[i] is None else str(paper[i]) for paper in papers)]
            for i, title in enumerate(PAPER)
        ]
    several = any(len(found) > 1 for found in rows.values())
    intervals = (
        "Means over seeds; +- is half of Student's 95% interval, of a single seed 1.96 standard errors of its images."
        if several
        else "Of one seed; +- is 1.96 standard errors of its images."
    )
    real = (
        "Distances are Frechet distances of the judge's features from the test images; "
        f"{judge['real_images']:,} training images have {judge['real_distance']:.2f}. The judge gets "
        f"{100 * judge['test_accuracy']:.1f}% of the test images right."
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{intervals} {real}\n"


def write_report(
    out: Path, results: Sequence[Mapping[str, Any]], judge: Mapping[str, float], order: Sequence[str]
) -> list[Path]:
    """Write table.md, results.json and figure.png into the study's folder; the files. Raises ImportError without
    matplotlib, once the other two are there."""
    rows = by_row(results, order)
    files = [out / name for name in ("table.md", "results.json", "figure.png")]
    everything = json.dumps({"judge": dict(judge), "results": list(results)}, indent=2) + "\n"
    write_atomically(files[0], lambda file: file.write_text(table(rows, judge), encoding="utf-8"))
    write_atomically(files[1], lambda file: file.write_text(everything, encoding="utf-8"))
    figure = _figure(rows, judge)
    write_atomically(files[2], lambda file: figure.savefig(file, dpi=110, format="png"))
    return files


def _figure(rows: Mapping[str, Sequence[Mapping[str, Any]]], judge: Mapping[str, float]) -> Any:
    """Four panels, each row of the study a bar with its 95% interval."""
    library("matplotlib", "the study's figure", "study")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    titles = [found[0]["title"] for found in rows.values()]
    for axes, measure in zip(figure.subplots(2, 2).flat, (ACCURACY, RECONSTRUCTED, UNGUIDED, GUIDED), strict=True):
        values = [value_of(measure, found) for found in rows.values()]
        errors = [value.half or 0.0 for value in values]
        axes.barh(titles, [value.mean for value in values], xerr=errors, color=[f"C{i}" for i in range(len(rows))])
        axes.invert_yaxis()
        axes.set_title(measure.title)
        if measure in (UNGUIDED, GUIDED):
            axes.axvline(judge["real_distance"], color="black", linestyle=":", label="real images")
            axes.margins(x=0.6)  # room for the legend
            axes.set_xlim(left=0)
            axes.legend(loc="lower right")
    return figure


def _at(result: Mapping[str, Any], place: Sequence[str]) -> float:
    value: Any = result
    for name in place:
        value = value[name]
    return float(value)


def _shown(value: Value, digits: int) -> str:
    return f"{value.mean:.{digits}f}" + ("" if value.half is None else f" +- {value.half:.{digits}f}")
