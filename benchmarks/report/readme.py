"""The tables of headline results in README.md, filled from committed reports."""

from __future__ import annotations

import json
from pathlib import Path

from alitok_fast.storage.files import write_atomically
from report import gpu_table
from report.collect import Image, collect, dit_name
from report.pages import JSON, MARKDOWN, markdown_table
from report.sections import NOT_MEASURED, Table, number, seconds

BEGIN = "<!-- speed: filled by `python benchmarks/report --readme` -->"
END = "<!-- end of speed -->"
NONE = "No report is committed yet; `make bench` writes one for this machine."
ONE_ROUND = "†"
PEERS = {
    "reference fp32": "reference, fp32",
    "bf16 autocast": "reference, bf16 autocast",
    "torch.compile, bf16": "torch.compile, bf16, static cache",
    "DiT-XL/2, 250 steps": dit_name("DiT-XL/2", 250),
    "DiT-XL/2, one step": dit_name("DiT-XL/2", 1),
}
"""Columns, and the systems that they are of."""
HEADER = ("machine", "model", "batch", "alitok_fast, per image", "share of floor", *PEERS)


def table(reports: Path, root: Path) -> str:
    """Markdown from every full report under `reports`; links are relative to `root`."""
    rows = []
    for path in sorted(reports.glob(f"*/{JSON}")):
        data = json.loads(path.read_text())
        if not data["alitok_fast"]["full"] or data["alitok_fast"]["partial"]:
            continue
        report = collect(data)
        link = f"[{report.title}]({path.with_name(MARKDOWN).relative_to(root).as_posix()})"
        for size, batch in dict.fromkeys((image.size, image.batch) for image in report.images):
            images = [image for image in report.images if (image.size, image.batch) == (size, batch)]
            dits = [dit for dit in report.diffusion if dit.batch == batch and not dit.cut]
            rows.append((link, size.upper(), str(batch), *_row([*images, *dits])))
    if not rows:
        return NONE
    text = markdown_table(Table(HEADER, rows))
    return f"{text}\n\n{ONE_ROUND}: one round." if any(ONE_ROUND in cell for row in rows for cell in row[3:]) else text


def _row(images: list[Image]) -> tuple[str, ...]:
    fastest = min((image for image in images if image.own), key=lambda image: image.per_image)
    found = {image.system: image for image in images}
    name = fastest.system.removeprefix("alitok_fast ")
    mark = ONE_ROUND if fastest.one_round else ""
    share = f"{fastest.share:.0%}" if fastest.share else NOT_MEASURED
    cells = [f"**{seconds(fastest.per_image)}**{mark} ({name})", share]
    for other in map(found.get, PEERS.values()):
        mark = ONE_ROUND if other and other.one_round else ""
        cells.append(f"{number(_times(other, fastest))}x{mark}" if other else NOT_MEASURED)
    return tuple(cells)


def _times(other: Image, fastest: Image) -> float:
    """As the report has it, round by round, where the two took turns."""
    if other.times is not None and other.first == fastest.system:
        return other.times
    return other.per_image / fastest.per_image


def filled(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what stands between the markers replaced. Raises ValueError where it has not both, once."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md: expected the markers {begin!r} and {end!r} once each, in this order")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def fill(readme: Path, reports: Path, check: bool) -> bool:
    """Fill the tables; with `check` only say whether they are up to date. The one of GPUs is filled where there is a
    place for it."""
    text = readme.read_text()
    wanted = filled(text, table(reports, readme.parent))
    if gpu_table.BEGIN in text:
        wanted = filled(wanted, gpu_table.table(reports, readme.parent), gpu_table.BEGIN, gpu_table.END)
    if not check and wanted != text:
        write_atomically(readme, lambda temporary: temporary.write_text(wanted))
    return wanted == text
