"""The table of a GPU's headline results in README.md, filled from the committed results of `make gpu`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report.pages import markdown_table
from report.sections import NOT_MEASURED, Table, number, seconds

BEGIN = "<!-- gpu: filled by `python benchmarks/report --readme` -->"
END = "<!-- end of gpu -->"
NONE = "No results of `make gpu` are committed yet."
HEADER = ("machine", "batch", "alitok_fast, per image", "a step", "share of floor", "reference fp32",
          "torch.compile, a step", "DiT-XL/2, 250 steps", "as a CUDA graph", "DiT-XL/2, one step")  # fmt: skip
FIRST = "-first"
EARLIER = "‡"
STEPS = 250


@dataclass(frozen=True)
class Results:
    """The numbers of a GPU's newest results, and of those before they were replaced (`<folder>-first`)."""

    link: str
    newest: dict[str, dict[str, Any]]
    earlier: dict[str, dict[str, Any]]

    def value(self, name: str) -> tuple[float | None, str]:
        """A number and a mark: ‡ where only the earlier results have it."""
        for numbers, mark in ((self.newest, ""), (self.earlier, EARLIER)):
            if name in numbers:
                return numbers[name]["value"], mark
        return None, ""


def _numbers(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    items = [item for step in json.loads(path.read_text())["steps"] for item in step["items"]]
    return {number["name"]: number for item in items for number in item.get("numbers", [])}


def table(reports: Path, root: Path) -> str:
    """Markdown from every full result under `reports`; links are relative to `root`."""
    rows = []
    for path in sorted(reports.glob("*/gpu_check.json")):
        data = json.loads(path.read_text())
        if data["rehearsal"] or data["quick"] or path.parent.name.endswith(FIRST):
            continue
        page = path.with_suffix(".md").relative_to(root).as_posix()
        earlier = path.parent.with_name(path.parent.name + FIRST) / path.name
        results = Results(f"[{data['device']}]({page})", _numbers(path), _numbers(earlier))
        rows += [_row(results, batch) for batch in (1, 8, 64, 256) if _step(batch) in results.newest]
    if not rows:
        return NONE
    text = markdown_table(Table(HEADER, rows))
    note = f"{EARLIER}: their times are of an earlier run on another machine of the kind."
    return f"{text}\n\n{note}" if EARLIER in text else text


def _step(batch: int) -> str:
    return f"B x 24 layers, batch {batch}, bf16: a step"


def _row(results: Results, batch: int) -> tuple[str, ...]:
    step = results.newest[_step(batch)]
    images, _ = results.value(f"batch {batch}, alitok_fast bf16: images")
    per_image = f"**{seconds(images / batch)}**" if images else NOT_MEASURED
    cells = [per_image, f"{step['value']:.3g} ms", f"{step['share']:.0%}"]
    for name in (f"batch {batch}: reference, fp32 takes", f"batch {batch}: torch.compile takes"):
        times, mark = results.value(name)
        cells.append(f"{number(times)}x{mark}" if times else NOT_MEASURED)
    decode, mark = results.value(f"batch {batch}, VAE decode")
    for name in ("step, eager", "step, graph"):
        one, _ = results.value(f"batch {batch}, {name}")
        there = one and images and decode is not None
        cells.append(f"{number((STEPS * one + decode) / images)}x{mark}" if there else NOT_MEASURED)
    one, _ = results.value(f"batch {batch}, one step and VAE decode")
    cells.append(f"{number(one / images)}x{mark}" if one and images else NOT_MEASURED)
    return (results.link, str(batch), *cells)
