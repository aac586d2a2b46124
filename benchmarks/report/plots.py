"""Figures of a report, as inline SVG with a caption; None where a report has nothing to draw."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure

from peers.diffusion import SIZES
from peers.serving import ENGINE
from report.collect import Image, Report

Drawn = tuple[str, str] | None
OWN = ("#0b5fa5", "#2c9fd6", "#6fc2b0")
OTHERS = ("#b3421b", "#e08a2e", "#7a5195", "#8a8f98", "#3f7d58", "#c2577f")
PARTS = {
    "transformer steps": "#0b5fa5",
    "draw": "#e0a92e",
    "tokens": "#5b8db8",
    "stage-2 decode": "#7fb77e",
    "VAE decode": "#7fb77e",
}


def throughput(report: Report) -> Drawn:
    caption = "Images per second against batch, both axes logarithmic; higher is better. Tokens and stage-2 decode."
    return _against_batch(report, lambda image: image.per_second, "images per second", caption)


def latency(report: Report) -> Drawn:
    caption = "Seconds until a whole batch is drawn against batch, both axes logarithmic; lower is better."
    return _against_batch(report, lambda image: image.seconds["median"], "seconds for the batch", caption)


def share_of_floor(report: Report) -> Drawn:
    own = [image for image in report.images if image.share]
    if not own:
        return None
    figure = Figure(figsize=(9, 0.7 + 0.3 * len(own)), layout="constrained")
    axes = figure.subplots()
    colours = _colours(report)
    axes.barh(
        [f"{image.size.upper()}, batch {image.batch}, {image.system.removeprefix('alitok_fast ')}" for image in own],
        [100 * image.share for image in own],
        color=[colours[image.system] for image in own],
    )
    for index, image in enumerate(own):
        axes.text(100 * image.share + 1, index, f"{image.share:.0%}", va="center", fontsize=8)
    axes.set_xlim(0, max(100, *(112 * image.share for image in own)))
    axes.axvline(100, color="#444", linewidth=1)
    axes.set_xlabel("share of the floor, %")
    axes.invert_yaxis()
    _plain(axes, "x")
    caption = (
        "Floor / time, in percent: 100% would be this machine's measured bandwidth, or its multiplications, used "
        "without a pause from label to pixels."
    )
    return _svg(figure), caption


def parts(report: Report) -> Drawn:
    drawn = [image for image in report.images if image.parts]
    if not drawn:
        return None
    sizes = list(dict.fromkeys((image.size, image.batch) for image in drawn))
    counts = [sum((image.size, image.batch) == size for image in drawn) for size in sizes]
    figure = Figure(figsize=(9, 0.8 + sum(0.55 + 0.28 * count for count in counts)), layout="constrained")
    rows = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, (size, batch) in zip(rows, sizes, strict=True):
        images = [image for image in drawn if (image.size, image.batch) == (size, batch)]
        for index, image in enumerate(images):
            left = 0.0
            for name, taken in image.parts.items():
                axes.barh(index, taken, left=left, color=PARTS[name])
                left += taken
            axes.text(left, index, f"  {left:.3g} s", va="center", fontsize=8)
            if image.floor:
                axes.plot([image.floor] * 2, [index - 0.4, index + 0.4], color="#111", linewidth=1.5)
        axes.set_yticks(range(len(images)), [image.system for image in images])
        axes.invert_yaxis()
        axes.set_title(f"{size.upper()}, batch {batch}", loc="left", fontsize=9)
        _plain(axes, "x")
    rows[-1].set_xlabel("seconds for the batch")
    used = [name for name in PARTS if any(name in image.parts for image in drawn)]
    handles = [matplotlib.patches.Patch(color=PARTS[name], label=name) for name in used]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(used), frameon=False, fontsize=8)
    caption = (
        "Where the time goes, seconds for the batch. In ours the draw is a part of its own; of other systems the "
        "tokens (transformer and draw) are one. The black mark in ours is the floor."
    )
    return _svg(figure), caption


def serving(report: Report) -> Drawn:
    if not report.serving:
        return None
    count = len(report.serving)
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(9.5, 0.6 + 3.2 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes, served in zip(grid, report.serving, strict=False):
        for (system, loads), colour in zip(served.loads.items(), (OWN[0], *OTHERS), strict=False):
            answered = [row for row in loads if row["latency"]]
            x, y = [row["images_per_second"] for row in answered], [row["latency"]["p95"] for row in answered]
            axes.plot(x, y, "-" if system == ENGINE else "--", marker="o", markersize=4, color=colour, label=system)
            refusing = [(one, other) for one, other, row in zip(x, y, answered, strict=True) if row["refused"]]
            axes.plot(*zip(*refusing, strict=True), "x", color="#111") if refusing else None
        axes.axhline(served.solo, color="#444", linewidth=1)
        axes.set(yscale="log", xlim=(0, None), xlabel="images per second", ylabel="p95, seconds")
        axes.set_title(served.name, fontsize=9)
        axes.yaxis.set_major_formatter("{x:g}")
        _plain(axes, "both")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    caption = (
        "The 95th percentile of latency, from the moment at which a request was due, against the images a second that "
        "were answered, as the offered load rises; further right and lower is better. The grey line is an image "
        "alone. A cross marks a load at which requests were refused."
    )
    return _svg(figure), caption


def _against_batch(report: Report, value: Callable[[Image], float], label: str, caption: str) -> Drawn:
    images = [*report.images, *(image for image in report.diffusion if not image.cut)]
    sizes = list(dict.fromkeys(image.size for image in report.images))
    if not sizes:
        return None
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    grid = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    colours = _colours(report)
    for axes, size in zip(grid, sizes, strict=True):
        for system, colour in colours.items():
            points = [image for image in images if image.system == system and image.size in (size, *SIZES)]
            if points:
                x, y = [image.batch for image in points], [value(image) for image in points]
                style = "-" if points[0].own else "--"
                axes.plot(x, y, style, marker="o", markersize=4, color=colour, label=system)
        batches = sorted({image.batch for image in images if image.size == size})
        axes.set(xscale="log", yscale="log", xlabel="batch, images", title=size.upper())
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        _plain(axes, "both")
    grid[0].set_ylabel(label)
    handles = {name: line for axes in grid for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return _svg(figure), caption


def _colours(report: Report) -> dict[str, str]:
    images = [*report.images, *report.diffusion]
    own = dict.fromkeys(image.system for image in images if image.own)
    others = dict.fromkeys(image.system for image in images if not image.own)
    both = ((own, OWN), (others, OTHERS))
    return {name: table[index % len(table)] for names, table in both for index, name in enumerate(names)}


def _plain(axes, grid: str) -> None:
    axes.grid(axis=grid, color="#e3e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)


def _svg(figure: Figure) -> str:
    """Text stays text, and two runs of the same data give the same file."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alitok_fast", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


FIGURES: dict[str, Callable[[Report], Drawn]] = {
    function.__name__: function for function in (throughput, latency, share_of_floor, parts, serving)
}
