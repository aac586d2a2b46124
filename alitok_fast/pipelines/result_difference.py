"""Two results of `evaluate samples` beside each other: what changed, and whether chance may have changed it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alitok_fast.evaluation.intervals import difference
from alitok_fast.pipelines.sample_evaluation import FORMAT
from alitok_fast.storage.files import differences, read_json
from alitok_fast.storage.text import shown


@dataclass(frozen=True)
class MeasureDifference:
    """`difference` is second - first; `half` that of its 95% interval, None where both have a single set of images."""

    measure: str
    first: float
    second: float
    difference: float
    half: float | None

    @property
    def verdict(self) -> str:
        if self.half is None:
            return "one set each: no interval (give several --seeds)"
        return "within the interval" if abs(self.difference) <= self.half else "outside the interval"


def differences_between(first: Path, second: Path) -> tuple[list[MeasureDifference], list[str]]:
    """Each measure that both results have, and what makes them incomparable, in sentences.

    Raises ValueError for a file of something else, or for results without a common measure; OSError for one that cannot
    be read.
    """
    one, other = (_read(path) for path in (first, second))
    rows = []
    for network, measures in one["measures"].items():
        for name in measures.keys() & other["measures"].get(network, {}).keys():
            values = [result["measures"][network][name]["values"] for result in (one, other)]
            means = [result["measures"][network][name]["mean"] for result in (one, other)]
            apart, half = difference(*values)
            rows.append(MeasureDifference(f"{shown(network)} {shown(name)}", means[0], means[1], apart, half))
    if not rows:
        raise ValueError(f"second: expected a measure of {first}, got {second} without any")
    about = ("count", "size", "networks", "references")
    unlike = differences({key: one[key] for key in about}, {key: other[key] for key in about})
    return sorted(rows, key=lambda row: row.measure), [
        f"the results are of different things: {line}" for line in unlike
    ]


def _read(path: Path) -> dict[str, Any]:
    result = read_json(path, "a result of `evaluate samples`")
    if result.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a result of `evaluate samples` ({FORMAT!r}), got another file")
    return result
