"""The section on requests that come one by one."""

from __future__ import annotations

from typing import Any

from load import BOUNDS, KEEPS_UP, held
from peers.serving import ENGINE, MOST, ONE, SYSTEMS, WAIT
from report.cells import NOT_MEASURED, Section, Table, number, seconds
from report.collect import Report, Serving


def serving(report: Report) -> Section | None:
    if not report.serving:
        return None
    tables = []
    for served in report.serving:
        tables += [_loads(served), _held(served)]
    tables.append(_alone(report.serving))
    stopped = [
        f"{system} of {served.name} after {number(served.loads[system][-1]['load'])}x ({why})"
        for served in report.serving
        for system, why in served.stopped.items()
    ]
    agreed = "; ".join(f"{served.name}: {_agreed(**served.same)}" for served in report.serving)
    ends = f"The loads end: {'; '.join(stopped)}."
    return Section("Serving", [*_text(report.serving[0]), f"Agreement: {agreed}.", ends], tables, ["serving"])


def _agreed(compared: int, rounded: int, levels: int) -> str:
    pixels = f"pixels of {rounded} differed by up to {levels} of 255 grey levels" if rounded else "all pixels too"
    return f"{compared} answers had the tokens of another system's answer to the same request, {pixels}"


def _text(served: Serving) -> list[str]:
    return [
        "Requests for one image each arrive at times that are fixed beforehand, whatever becomes of those before them "
        "(an open loop): a Poisson process given its number of requests, the same times and requests for every system. "
        "**Load** is the offered rate as a multiple of what one image at a time through `pipe()` can do. **Latency** "
        "counts from the moment at which a request was due, to its pixels; a quantile is a measured value, the "
        "smallest that such a share of the answered requests did not exceed, so with fewer than 100 requests p99 is "
        "the slowest one, and with fewer than 20 p95 is too. **Images/s** is what was answered, divided by the time "
        "until the last answer, which makes it lower than the rate where there are few. A request that comes while "
        f"{served.outstanding} wait for their answers is **refused**. **Late** is how long after it was due the "
        "generator sent a request, median and most.",
        f"**{ENGINE}** is continuous batching. **{ONE[0].upper() + ONE[1:]}** is a queue and one worker, which calls "
        f"`pipe()` with one label. **Static batches** are a queue and one worker, which calls it with up to {MOST} "
        f"labels and waits for more until the first has been there for {number(1e3 * WAIT)} ms. They have the same "
        "models, precision, seed and image ids, and gave the same images (below). "
        f"Loads rise for a system until p95 passes {number(served.slowest)}x the time of an image alone, "
        f"requests are refused, or less than {KEEPS_UP:.0%} of the offered rate is done. The demo's weights are "
        "trained, those of B are random: how many guesses of the next tokens are right, and with that how many passes "
        "an image takes, depends on them.",
        "**Within a bound of p95**: the most images/s that was measured with p95 up to so many times the time of an "
        "image alone and no request refused, of the loads in the table; nothing is interpolated.",
    ]


def _loads(served: Serving) -> Table:
    header = ("load", "offered/s", "images/s", "p50", "p95", "p99", "requests", "refused", "late")
    rows = [_row(system, row) for system, rows in served.loads.items() for row in rows]
    return Table((f"**{served.name}, {seconds(served.solo)} alone**", *header), rows)


def _row(system: str, row: dict[str, Any]) -> tuple[str, ...]:
    latency = [seconds(row["latency"][name]) if row["latency"] else NOT_MEASURED for name in ("p50", "p95", "p99")]
    rates = number(row["offered"]), number(row["images_per_second"])
    late = f"{seconds(row['late']['median'])}, {seconds(row['late']['most'])}"
    name = f"**{system}**" if system == ENGINE else system
    return (name, f"{number(row['load'])}x", *rates, *latency, str(row["requests"]), str(row["refused"]), late)


def _held(served: Serving) -> Table:
    """Images a second within each bound, and how many times as many the engine's are."""
    rates = {
        system: [held(rows, bound * served.solo) for bound in BOUNDS] for system, rows in served.loads.items()
    }  # fmt: skip
    rows = [
        (f"**{system}**" if system == ENGINE else system, *("none" if rate is None else number(rate) for rate in of))
        for system, of in rates.items()
    ]
    for system in SYSTEMS:
        if system != ENGINE and {system, ENGINE} <= set(rates):
            pairs = zip(rates[ENGINE], rates[system], strict=True)
            ratios = (
                NOT_MEASURED if own is None or other is None else f"{number(own / other)}x" for own, other in pairs
            )
            rows.append((f"{ENGINE} / {system}", *ratios))
    bounds = (f"p95 <= {number(bound)}x ({seconds(bound * served.solo)})" for bound in BOUNDS)
    return Table((f"**{served.name}**, images/s within a bound of p95", *bounds), rows)


def _alone(all_served: list[Serving]) -> Table:
    rows = []
    for served in all_served:
        pipe, engine = ({**one, "median": one["median"] / served.images} for one in served.alone)
        rounds = f"{engine['rounds']} of {served.images}"
        rows.append(
            (served.name, seconds(pipe["median"]), seconds(engine["median"]), f"{number(served.times)}x", rounds)
        )
    header = ("a request alone, in alternating turns", "`pipe()`", ENGINE, f"{ENGINE} / `pipe()`", "turns of images")
    return Table(header, rows)
