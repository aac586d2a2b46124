"""What runs inside one step of the GPU check: items, each recorded before it begins and when it has ended.

A step is a process of its own (`python -m gpu.<step>`), so that a crash or a hang costs that step alone. Each item's
result goes into the record as one line of JSON, at once: whoever started the process (runner.py) knows from it which
item was under way when the process died, and starts another one for the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ceilings import Ceilings, synchronize

CEILINGS = {field.name for field in dataclasses.fields(Ceilings)}
BROKEN = 70  # exit status: the device takes no more work from this process, another one may go on


@dataclass(frozen=True)
class Number:
    """One result. Times and errors have a `floor` or a `bound` in their own unit; what is neither is a rate that others
    are compared with, or a count."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    floor_is: str = ""
    """What the floor is: "bytes / bandwidth" or "operations / rate"."""
    bound: float | None = None
    key: str = ""
    """A short name in the table, for the numbers that matter most."""
    spread: tuple[float, float, int] | None = None
    """Fastest, slowest, rounds."""

    @property
    def share(self) -> float | None:
        """How much of a measured time is its floor."""
        return None if self.floor is None else self.floor / self.value

    def to_dict(self) -> dict[str, Any]:
        values = {**dataclasses.asdict(self), "share": self.share}
        empty = (None, "", False)  # by identity: 0.0 equals False
        return {name: value for name, value in values.items() if not any(value is nothing for nothing in empty)}


class Skipped(Exception):
    """Raised by an item that cannot run here; the message says why."""


@dataclass(frozen=True)
class Context:
    """What an item is told: where to run, how much, and the ceilings that floors come from."""

    device: torch.device
    quick: bool
    ceilings: Ceilings | None

    def pick(self, *, quick: Any, full: Any) -> Any:
        return quick if self.quick else full

    def seconds(self, run: Callable[[], object], rounds: int | None = None, warm: bool = True) -> list[float]:
        """Of `rounds` runs, one after the other; by events on the device, where host time would be the launch's.
        `warm` runs it once before."""
        rounds = self.pick(quick=3, full=20) if rounds is None else rounds
        if warm:
            run()
        synchronize(self.device)
        if self.device.type != "cuda":
            return [_host_seconds(run) for _ in range(rounds)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in zip(marks, marks[1:], strict=False)]

    def timed(
        self,
        name: str,
        seconds: Sequence[float],
        count: int = 1,
        *,
        read: float = 0.0,
        flops: float = 0.0,
        rate: str = "bf16_flops",
        least: float | None = None,
        unit: str = "ms",
        key: str = "",
    ) -> Number:
        """The median time of one of `count` equal parts of a run, and the least that this machine needs for one, which
        reads `read` bytes and does `flops` operations at `rate`, or takes `least` seconds by a sum of such."""
        one = {"ms": 1e3, "us": 1e6}[unit]
        floor, floor_is = least, "bytes / bandwidth + operations / rate"
        if self.ceilings is not None and least is None:
            by_bytes, by_work = read / self.ceilings.read_bytes, flops / getattr(self.ceilings, rate)
            floor = max(by_bytes, by_work)
            floor_is = "bytes / bandwidth" if by_bytes >= by_work else f"operations / {rate}"
        floor = None if floor is None else floor * one
        factor = one / count
        spread = min(seconds) * factor, max(seconds) * factor, len(seconds)
        median = statistics.median(seconds) * factor
        return Number(name, median, unit, floor, floor_is if floor is not None else "", key=key, spread=spread)


def _host_seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def within(name: str, error: float, bound: float, unit: str = "relative", key: str = "") -> Number:
    """An error as a number, after a check that it is within its bound. NaN never is."""
    if not error <= bound:
        raise AssertionError(f"{name}: expected at most {bound:.3g} ({unit}), got {error:.3g}")
    return Number(name, error, unit, bound=bound, key=key)


def same(name: str, got: Tensor, expected: Tensor) -> Number:
    """How many elements differ, after a check that none do."""
    return within(f"{name} that differ", (got != expected).sum().item(), 0, "count")


Item = Callable[[Context], Sequence[Number]]


class Items:
    """The items of one step, by name, in the order in which they run."""

    def __init__(self) -> None:
        self._items: dict[str, tuple[Item, bool]] = {}

    def __call__(self, name: str, gpu: bool = False) -> Callable[[Item], Item]:
        """Decorator: the item `name`; with `gpu` it is skipped on the CPU, by name."""

        def add(function: Item) -> Item:
            self._items[name] = function, gpu
            return function

        return add

    def main(self) -> None:
        """Run the items that the command line leaves, recording each. Exit status 0 even where items fail: the record
        says so. BROKEN when the device no longer works."""
        options = _options()
        context = Context(options.device, options.quick, _read_ceilings(options.ceilings))
        names = options.items or list(self._items)
        with open(options.record, "a", encoding="utf-8") as record:
            _write(record, {"items": names})
            for name in names:
                if name in options.skip:
                    continue
                _write(record, {"item": name, "state": "began", "at": time.time()})
                print(f"--- {name}", flush=True)
                begin = time.monotonic()
                outcome = _outcome(*self._items[name], context)
                print(outcome.get("reason", ""), flush=True)
                _write(record, {"item": name, "seconds": round(time.monotonic() - begin, 2), **outcome})
                measured = {number["name"]: number["value"] for number in outcome.get("numbers", [])}
                if set(measured) == CEILINGS:  # floors of the items after it
                    context = dataclasses.replace(context, ceilings=Ceilings(**measured))
                if not _works(options.device):
                    sys.exit(BROKEN)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--record", type=Path, required=True, help="JSON lines are added to it")
    parser.add_argument("--ceilings", type=Path, help="JSON of ceilings.Ceilings")
    parser.add_argument("--items", nargs="*", default=[], help="names; all where there are none")
    parser.add_argument("--skip", nargs="*", default=[], help="names")
    return parser.parse_args()


def _read_ceilings(path: Path | None) -> Ceilings | None:
    return None if path is None or not path.is_file() else Ceilings(**json.loads(path.read_text()))


def _write(record, entry: dict[str, Any]) -> None:
    record.write(json.dumps(entry) + "\n")
    record.flush()
    os.fsync(record.fileno())


def _outcome(item: Item, gpu: bool, context: Context) -> dict[str, Any]:
    if gpu and context.device.type != "cuda":
        return {"state": "skipped", "reason": "needs a GPU"}
    try:
        numbers = item(context)
        synchronize(context.device)  # what a kernel did wrong shows here
    except Skipped as reason:
        return {"state": "skipped", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return {"state": "failed", "reason": f"{type(error).__name__}: {first}"[:500]}
    return {"state": "passed", "numbers": [number.to_dict() for number in numbers]}


def _works(device: torch.device) -> bool:
    """After an illegal access every later call of the process fails as well."""
    if device.type != "cuda":
        return True
    try:
        torch.ones(8, device=device).sum().item()
    except RuntimeError:
        return False
    return True
