"""What a report says, in order: headings, paragraphs, tables and figures, before they become Markdown or HTML."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from machine import BUSY
from report.cells import NOT_MEASURED, Section, Table, number, seconds, spread
from report.collect import Image, Operator, Report
from report.serving import serving


def sections(report: Report) -> list[Section]:
    made = [_machine(report), _images(report), _parts(report), _diffusion(report), serving(report), _operators(report)]
    return [one for one in [*made, _gpu(report), _absent(report), _method(report)] if one is not None]


def _machine(report: Report) -> Section:
    run, machine = report.run, report.run["machine"]
    cpu, ceilings = machine["cpu"], run["ceilings"] or {}
    rows = [
        ("device", machine["name"]),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores, {machine['threads']} threads of torch, {_isa(cpu)}"),
        ("date, commit", f"{report.date}, {report.commit}"),
        ("command", f"`{run['command']}` ({run['seconds'] // 60} min {run['seconds'] % 60} s)"),
        ("versions", f"alitok_fast {machine['alitok_fast']}, Python {machine['python']}, "
         + ", ".join(f"{name} {version}" for name, version in machine["packages"].items())),
    ]  # fmt: skip
    if "cuda" in machine:
        rows.append(("CUDA", f"driver {machine['cuda']['driver']}, torch built for {machine['cuda']['torch']}"))
    names = {"fp32_flops": "fp32", "bf16_flops": "bf16", "int8_flops": "int8", "read_bytes": "memory"}
    measured = [
        f"{names[key]} {number(value / 1e9)} {'GB/s' if key == 'read_bytes' else 'GFLOP/s'}"
        for key, value in ceilings.items()
    ]
    rows.append(("measured ceilings", ", ".join(measured) or "none"))
    if report.read_bytes:
        slowest, fastest = (number(value / 1e9) for value in report.read_bytes)
        rows.append(("memory, between the rounds", f"{slowest} to {fastest} GB/s"))
    text = []
    if not run["full"]:
        text.append("**Quick run: models cut to a few layers. These are no figures of the published sizes.**")
    if run["partial"]:
        text.append("**Part of the benchmarks only.**")
    if run.get("note"):
        text.append(f"**Note.** {run['note']}")
    if report.busy:
        text.append(
            f"**The machine was busy** during {len(report.busy)} of {report.count} benchmarks, whose times are too "
            f"long: other processes had more than {BUSY:g} cores in {_some(report.busy)}."
        )
    # A model that was cut short may fit into the caches, whose bandwidth no floor counts on.
    images = [image for image in report.images if not image.cut and (image.share or 0) > 1]
    above = [f"{image.system} {image.size.upper()} {image.batch}" for image in images]
    above += [one.name for one in report.operators if one.unit != "read_bytes" and one.rate > one.ceiling]
    if above:
        text.append(
            f"**Shares above 100%** in {_some(above)}: the ceilings were measured too low, so all shares are too high."
        )
    if run["failed"]:
        text.append(f"**{len(run['failed'])} checks failed**, see the end.")
    return Section("Machine", text, [Table(("", ""), rows)])


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _isa(cpu: dict) -> str:
    return f"{cpu['isa'] or 'no native kernels'}{' with AMX' if cpu['amx'] else ''}"


def _images(report: Report) -> Section | None:
    if not report.images:
        return None
    text = [
        "Class labels to pixels with guidance, tokens and stage-2 decode; B, L, XL are the generators. **x** is how "
        "many times longer than the first row of its table, the median over rounds of the ratio of both in the same "
        "round. **Floor** is the least time that this machine's measured ceilings allow for the same work in the same "
        "precision: weights, keys and values read once a step, or all multiplications, whichever takes longer; its "
        "share is floor / time. The memory's speed is the highest that was measured between the same rounds.",
    ]
    header = ("system", "seconds of the batch", "per image", "images/s", "floor, per image", "share of floor", "x")
    tables = []
    for (size, batch), group in groupby(report.images, key=lambda image: (image.size, image.batch)):
        rows = [_image_row(image) for image in group]
        tables.append(Table((f"**{size.upper()}, batch {batch}**", *header[1:]), rows))
    return Section("Whole images", text, tables, ["throughput", "latency", "share_of_floor"])


def _image_row(image: Image) -> tuple[str, ...]:
    name = f"**{image.system}**" if image.own else image.system
    floor = seconds(image.floor / image.batch) if image.floor else ""
    share = f"{image.share:.0%}" if image.share else ""
    times = f"{number(image.times)}x" + (", 1 round" if image.one_round else "") if image.times is not None else ""
    return (name, spread(image.seconds), seconds(image.per_image), number(image.per_second), floor, share, times)


def _parts(report: Report) -> Section | None:
    if not report.images:
        return None
    names = ("transformer steps", "draw", "tokens", "stage-2 decode")
    rows = [
        (f"{image.size.upper()}, batch {image.batch}", image.system)
        + tuple(seconds(image.parts[name]) if name in image.parts else "" for name in names)
        + ("" if image.tokens_per_pass is None else number(image.tokens_per_pass),)
        for image in report.images
    ]
    text = [
        "Seconds of the batch, medians. In ours the draws (guidance, softmax, noise, choice) are timed by themselves "
        "and the steps are the rest of the tokens' time; of other systems the tokens are one part. A pass of several "
        "tokens an image keeps those whose guesses were right: the images are the same. How often they are right with "
        "trained weights of these sizes was not measured; rows that say so take the rate of the trained demo model."
    ]
    table = with_predictions(
        Table(("model", "system", *names, "tokens a pass"), rows), report.images, "steps, predicted"
    )
    return Section("Time by part", text, [table], ["parts"])


def with_predictions(table: Table, items: Sequence[Image | Operator], title: str) -> Table:
    """A column more for what the model of benchmarks/cost.py gives each row, with the fastest and the slowest memory
    between the rounds. Reports without predictions stay as they are."""
    if not any(item.predicted for item in items):
        return table
    cells = []
    for item in items:
        least, most = (seconds(item.predicted[end]) if item.predicted else "" for end in ("least", "most"))
        cells.append(least if least == most else f"{least} to {most}")
    return Table((*table.header, title), [(*row, cell) for row, cell in zip(table.rows, cells, strict=True)])


def _diffusion(report: Report) -> Section | None:
    if not report.diffusion:
        return None
    systems = list(dict.fromkeys(dit.system for dit in report.diffusion))
    rows = []
    for batch, group in groupby(report.diffusion, key=lambda dit: dit.batch):
        dits = {dit.system: dit for dit in group}
        for dit in dits.values():
            name = dit.system + (" **(cut to a few layers)**" if dit.cut else "")
            rows.append((name, *_batch_cells(dit), *("" for _ in systems)))
        for image in report.images:
            if image.own and image.batch == batch:
                ratios = (_takes(dits.get(system), image) for system in systems)
                rows.append((f"**{image.system} {image.size.upper()}**", *_batch_cells(image), *ratios))
    text = [
        "DiT-XL/2 at 256x256 (arXiv 2212.09748; diffusers' model with random weights, bfloat16, two rows an image for "
        "guidance). One step was timed and **multiplied by 250**, which all do the same work; the decode of the VAE "
        "is added. LightningDiT-XL (arXiv 2501.01423: 675 M parameters, as many tokens) takes 250 steps too, so its "
        "time is about the same.",
    ]
    if any("one step" in system for system in systems):
        text.append(
            "**One step** is what the strongest one-step generators do today: one pass of the same transformer, a row "
            "an image as guidance is trained in, and the same decode. W-Flow (arXiv 2605.11755) publishes both sizes, "
            "with FID 1.52 (B/2) and 1.29 (XL/2); its blocks differ from diffusers' in detail."
        )
    text.append("The last columns are how many times longer each takes for an image; **below 1x it is the faster**.")
    if faster := _faster(report):
        text.append(f"**Faster than every one of ours at that batch:** {', '.join(faster)}.")
    takes = (f"{system.removesuffix(', bf16')} takes" for system in systems)
    header = ("system", "batch", "seconds of the batch", "per image", *takes)
    return Section("Beside diffusion", text, [Table(header, rows)])


def _batch_cells(image: Image) -> tuple[str, ...]:
    return (str(image.batch), spread(image.seconds), seconds(image.per_image))


def _takes(dit: Image | None, image: Image) -> str:
    if dit is None:
        return NOT_MEASURED
    return "" if dit.cut or image.cut else f"{number(dit.per_image / image.per_image)}x"


def _faster(report: Report) -> list[str]:
    """Diffusion that draws an image in less time than ours of any size and precision."""
    faster = []
    for dit in report.diffusion:
        own = [image for image in report.images if image.own and image.batch == dit.batch]
        whole = own and not any(image.cut for image in (dit, *own))
        if whole and dit.per_image < min(image.per_image for image in own):
            faster.append(f"{dit.system} (batch {dit.batch})")
    return faster


def _operators(report: Report) -> Section | None:
    if not report.operators:
        return None
    text = [
        "One call. **x** after an alternative is how many times longer it takes. The share is of the ceiling measured "
        "in this run: memory read (between the rounds) for GB/s, the precision's multiplications for GFLOP/s."
    ]
    header = ("benchmark", "alitok_fast", "rate", "share of ceiling", "alternatives")
    table = Table(header, [_operator_row(one) for one in report.operators])
    return Section("Operators", text, [with_predictions(table, report.operators, "predicted")])


def _operator_row(one: Operator) -> tuple[str, ...]:
    unit = "GB/s" if one.unit == "read_bytes" else "GFLOP/s"
    others = "; ".join(
        f"{name} {number(other['times'])}x ({other['seconds']['rounds']})" for name, other in one.alternatives.items()
    )
    rate, share = f"{number(one.rate / 1e9)} {unit}", f"{one.rate / one.ceiling:.0%}"
    return (one.name, spread(one.seconds), rate, share, others)


GPU_COLUMNS = {
    "sm_mhz": "SM clock, MHz", "memory_mhz": "memory clock, MHz", "watts": "power, W", "celsius": "temperature, C",
}  # fmt: skip


def _gpu(report: Report) -> Section | None:
    if not report.gpu:
        return None
    rows = []
    for name, gpu in report.gpu.items():
        throttling = "not read" if gpu["throttling"] is None else ", ".join(gpu["throttling"]) or "none"
        rows.append((name, *(_watched(gpu.get(key)) for key in GPU_COLUMNS), throttling))
    text = ["Median, least and most of samples every 0.25 s."]
    unread = dict.fromkeys(pair for gpu in report.gpu.values() for pair in gpu.get("unread", {}).items())
    if unread:
        reasons = "; ".join(f"{GPU_COLUMNS.get(name, name)} ({reason})" for name, reason in unread)
        text.append(f"**Not read:** {reasons}. Without clocks and throttling the times of a GPU say little.")
    return Section("GPU while it ran", text, [Table(("benchmark", *GPU_COLUMNS.values(), "throttling"), rows)])


def _watched(values: dict[str, float] | None) -> str:
    if values is None:
        return "not read"
    return f"{number(values['median'], 4)} ({number(values['least'], 4)} to {number(values['most'], 4)})"


def _absent(report: Report) -> Section | None:
    absent = {**report.missing, **report.run["skipped"]}
    rows = [
        *(("failed", *pair) for pair in report.run["failed"].items()),
        *(("not run", *pair) for pair in absent.items()),
    ]
    return Section("Not run, and why", [], [Table(("", "what", "reason"), rows)]) if rows else None


def _method(report: Report) -> Section:
    text = [
        "Each benchmark first checks that outputs agree with the float32 reference. Then the contenders take turns, "
        "round after round in one process, so that a change of clock meets all of them. Caches, compilation and "
        "packing are done before. Every time is a median, with the fastest and slowest round and the number of "
        "rounds: slow contenders have fewer, down to one. Weights are random: speed does not depend on them.",
        "`report.json` beside this page holds all rounds; `python benchmarks/report report.json` rebuilds the pages.",
    ]
    return Section("How it was measured", text)
