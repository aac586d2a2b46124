"""A check's results for a screen, as a page, and as one packed log."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alitok_fast.storage.files import write_atomically
from gpu.runner import Result
from report.pages import markdown_table
from report.sections import Table

KEYS_SHOWN = 3
LOG_BYTES = 2**20  # of one step: the beginning and the end of a longer one
WIDTH = 112
RULE = "=" * 8
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
REHEARSAL = "A rehearsal on the CPU. No GPU has run this."


def quantity(value: float, unit: str) -> str:
    """1.31 us, 3.00 TB/s, 57%."""
    if unit in ("B/s", "FLOP/s"):
        scale, prefix = next((p for p in PREFIXES if value >= p[0]), (1.0, ""))
        return f"{value / scale:.3g} {prefix}{unit}"
    if unit in ("share", "%"):
        return f"{value * (100 if unit == 'share' else 1):.3g}%"
    whole = abs(value) >= 100 or value == int(value)
    text = f"{value:.0f}" if whole and abs(value) < 1e9 else f"{value:.3g}"
    return f"{text} {unit}"


def numbers(result: Result) -> list[dict[str, Any]]:
    return [number for item in result.items for number in item.get("numbers", [])]


def summary(result: Result) -> str:
    """What the table says of a step: why it has not passed, or the numbers that matter most."""
    if result.state != "passed":
        return result.reason
    keys = [number for number in numbers(result) if number.get("key")][:KEYS_SHOWN]
    parts = []
    for number in keys:
        share = f" ({number['share']:.0%} of floor)" if "share" in number else ""
        parts.append(f"{number['key']} {quantity(number['value'], number['unit'])}{share}")
    bounded = [number["value"] / number["bound"] for number in numbers(result) if number.get("bound")]
    if bounded and len(parts) < KEYS_SHOWN:
        parts.append(f"worst of {len(bounded)} errors {max(bounded):.0%} of its bound")
    left_out = [item for item in result.items if item["state"] == "skipped"]
    if left_out:
        parts.append(f"skipped {len(left_out)} of {len(result.items)} items: {left_out[0]['reason']}")
    return ", ".join(parts)


def row(result: Result) -> str:
    state = f"{result.state} *" if result.before else result.state
    return f"{result.name:<30} {state:<10} {result.seconds:>7.1f}  {summary(result)}"[:WIDTH]


def screen(title: str, results: Iterable[Result], verdict: str) -> str:
    """At most a line for each step, cut to the width of a screen."""
    lines = [title, "", f"{'step':<30} {'result':<10} {'seconds':>7}  numbers"]
    results = list(results)
    lines += [row(result) for result in results]
    if any(result.before for result in results):
        lines.append("* in an earlier run, on the same sources")
    return "\n".join([*lines, "", verdict])


def markdown(title: str, facts: dict[str, str], results: list[Result], verdict: str) -> str:
    lines = [f"# {title}", "", verdict, "", markdown_table(Table(("", ""), list(facts.items()))), "", "## Steps", ""]
    rows = [
        (one.name, one.state + (" before" if one.before else ""), f"{one.seconds:.1f}", _busy(one), summary(one))
        for one in results
    ]
    lines += [markdown_table(Table(("step", "result", "seconds", "GPU meanwhile", "numbers"), rows)), ""]
    for result in results:
        rows = [_row(item, number) for item in result.items for number in item.get("numbers", [])]
        other = [(item["item"], item["state"], item.get("reason", "")) for item in result.items if "reason" in item]
        if rows or other:
            lines += [f"## {result.name}", ""]
        if rows:
            header = ("item", "number", "value", "fastest to slowest (rounds)", "floor or bound", "share of floor")
            lines += [markdown_table(Table(header, rows)), ""]
        if other:
            lines += [markdown_table(Table(("item", "result", "why"), other)), ""]
    return "\n".join(lines)


def _row(item: dict[str, Any], number: dict[str, Any]) -> tuple[str, ...]:
    unit, spread, limit = number["unit"], "", ""
    if "spread" in number:
        fastest, slowest, rounds = number["spread"]
        spread = f"{fastest:.3g} to {slowest:.3g} ({rounds})"
    if "floor" in number:
        limit = f"{quantity(number['floor'], unit)}, {number['floor_is']}"
    elif "bound" in number:
        limit = f"at most {quantity(number['bound'], unit)}"
    share = f"{number['share']:.0%}" if "share" in number else ""
    return item["item"], number["name"], quantity(number["value"], unit), spread, limit, share


def _busy(result: Result) -> str:
    """Clocks and power, where they could be read."""
    watched, units = result.gpu or {}, {"sm_mhz": "MHz", "watts": "W"}
    parts = [f"{watched[name]['median']:.0f} {unit}" for name, unit in units.items() if watched.get(name)]
    unread = [f"{name} not read ({reason})" for name, reason in watched.get("unread", {}).items()]
    return ", ".join([*parts, *(watched.get("throttling") or []), *unread])


def packed_log(path: Path, logs: Iterable[Path]) -> None:
    """All logs one after the other, each under its name, in one gzip file."""
    parts = []
    for log in logs:
        if log.is_file():
            text = log.read_bytes()
            if len(text) > LOG_BYTES:
                cut = f"\n... {len(text) - LOG_BYTES} bytes left out ...\n".encode()
                text = text[: LOG_BYTES // 2] + cut + text[-LOG_BYTES // 2 :]
            parts.append(f"{RULE} {log.stem} {RULE}\n".encode() + text.removesuffix(b"\n") + b"\n")
    write_atomically(path, lambda temporary: temporary.write_bytes(gzip.compress(b"".join(parts), mtime=0)))


def unpack_log(path: Path, folder: Path) -> None:
    """The logs that `packed_log` packed, as files of their own again; none where there is no whole file."""
    try:
        text = gzip.decompress(path.read_bytes())
    except (OSError, EOFError):
        return
    _, *parts = re.split(f"^{RULE} (.+) {RULE}\n".encode(), text, flags=re.MULTILINE)
    for stem, log in zip(parts[::2], parts[1::2], strict=True):
        (folder / f"{stem.decode()}.log").write_bytes(log)
