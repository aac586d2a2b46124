"""Runs steps as processes: each under its limit, and going on after whatever one of them does."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.plan import Step, pytest_arguments

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.05
GRACE_SECONDS = 8.0  # for pytest to write down what it has, when interrupted
# What a shell starts in the background ignores interrupts, and so does all that this starts, unless it says otherwise.
INTERRUPTIBLE_PYTEST = """\
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
# In the session of this process, so that whoever ends all of that ends the steps too; Python 3.10 cannot say so.
GROUP_OF_ITS_OWN = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
NO_TIME = "no time was left"


@dataclass
class Result:
    """What a step came to. `state` is passed, failed, skipped (nothing of it can run here) or not run."""

    name: str
    part: str
    required: bool
    state: str
    seconds: float = 0.0
    reason: str = ""
    items: list[dict[str, Any]] = field(default_factory=list)
    gpu: dict[str, Any] | None = None
    """Clocks, power and throttling meanwhile."""
    before: bool = False
    """Passed in an earlier run on the same sources, whose numbers these are."""


@dataclass(frozen=True)
class Runner:
    """Where and how steps run.

    `scratch` receives each step's record and log. `environment` is added to every process's; `deadline` is when the
    whole check must end, by `time.monotonic()`.
    """

    device: str
    quick: bool
    scratch: Path
    deadline: float
    environment: Mapping[str, str] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set it to end the steps under way, from another thread."""

    def run(self, step: Step) -> Result:
        begin = time.monotonic()
        self.log(step).unlink(missing_ok=True)
        if self._left() <= 0 or self.ended.is_set():
            return Result(step.name, step.part, step.required, "not run", reason=NO_TIME)
        work = self._tests if step.tests else self._items
        result = work(step, begin + min(step.limit, self._left()))
        result.seconds = round(time.monotonic() - begin, 1)
        return result

    def log(self, step: Step) -> Path:
        return self.scratch / f"{_slug(step.name)}.log"

    @property
    def ceilings(self) -> Path:
        """Written when they have been measured; the floors of all later steps come from it."""
        return self.scratch / "ceilings.json"

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    # ---- items ----

    def _items(self, step: Step, until: float) -> Result:
        record = _Record(self.scratch / f"{_slug(step.name)}.jsonl")
        ended = ""
        while time.monotonic() < until and not self.ended.is_set():
            command = [sys.executable, "-m", step.module, "--device", self.device, "--record", str(record.file)]
            command += ["--quick"] if self.quick else []
            command += ["--ceilings", str(self.ceilings)] if self.ceilings.is_file() else []
            command += ["--items", *step.items] if step.items else []
            command += ["--skip", *record.done] if record.done else []
            before = len(record.done)
            ended = self._process(step, command, until, lambda: record.under_way_since(step.item_limit))
            if record.under_way is not None:
                out_of_time = self._left() <= 0
                reason = NO_TIME if out_of_time else ended or "it ended without a result"
                record.close("not run" if out_of_time else "failed", reason)
            if not record.left or len(record.done) == before:
                break
        return self._judged(step, record, ended)

    def _judged(self, step: Step, record: _Record, ended: str) -> Result:
        items = [*record.results, *({"item": name, "state": "not run", "reason": NO_TIME} for name in record.left)]
        result = Result(step.name, step.part, step.required, "passed", items=items)
        failed = [item for item in items if item["state"] == "failed"]
        if failed:
            result.state, result.reason = "failed", f"{failed[0]['item']}: {failed[0]['reason']}"
        elif not items:
            result.state, result.reason = "failed", f"{ended or 'no item began'}; its log ends: {self._last_line(step)}"
        elif left := [item for item in items if item["state"] == "not run"]:
            result.state, result.reason = "not run", f"{len(left)} of {len(items)} items: {NO_TIME}"
        elif all(item["state"] == "skipped" for item in items):
            result.state, result.reason = "skipped", items[0]["reason"]
        return result

    def _last_line(self, step: Step) -> str:
        lines = self.log(step).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "empty"

    # ---- tests ----

    def _tests(self, step: Step, until: float) -> Result:
        report = self.scratch / f"{_slug(step.name)}.xml"
        command = [
            sys.executable,
            "-c",
            INTERRUPTIBLE_PYTEST,
            *pytest_arguments(step, self.device == "cuda", str(report)),
        ]
        ended = self._process(step, command, until, lambda: False, folder=ROOT)
        result = Result(step.name, step.part, step.required, "failed", reason=ended)
        if report.is_file():
            counts, failures = _junit(report)
            numbers = [{"name": name, "value": value, "unit": "tests", "key": name} for name, value in counts.items()]
            result.items = [{"item": "pytest", "state": "passed", "numbers": numbers}]
            result.items += [{"item": name, "state": "failed", "reason": reason} for name, reason in failures.items()]
            if failures:
                name, reason = next(iter(failures.items()))
                result.reason = f"{len(failures)} failed; {name}: {reason}"
            elif not ended:
                result.state = "passed" if counts["passed"] else "skipped"
        elif not ended:
            result.reason = f"no report; the end of its log: {self._last_line(step)}"
        return result

    # ---- processes ----

    def _process(
        self, step: Step, command: list[str], until: float, overdue: Callable[[], bool], folder: Path | None = None
    ) -> str:
        """Run a command to its end, or kill it with all that it has started. Empty when it ended well, else what
        happened, in words."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment, **step.environment}
        # The checkout, installed or not.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        with open(self.log(step), "ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, cwd=folder or ROOT / "benchmarks", env=environment, stdout=log, stderr=subprocess.STDOUT,
                **GROUP_OF_ITS_OWN,
            )  # fmt: skip
            begin = time.monotonic()
            try:
                while process.poll() is None:
                    if overdue():
                        return f"it did not end within {step.item_limit:g} s"
                    if self.ended.is_set():
                        return "the check was ended"
                    if time.monotonic() > until:
                        return f"its step did not end within {until - begin:.0f} s"
                    time.sleep(POLL_SECONDS)
            finally:
                _stop(process, GRACE_SECONDS if step.tests else 0.0)
        return _ended(process.returncode)


class _Record:
    """The lines that a step's processes have written, and what they amount to."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.unlink(missing_ok=True)

    @property
    def _entries(self) -> list[dict[str, Any]]:
        if not self.file.is_file():
            return []
        lines = self.file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # the last one may be half written

    @property
    def results(self) -> list[dict[str, Any]]:
        return [entry for entry in self._entries if entry.get("state") not in (None, "began")]

    @property
    def done(self) -> list[str]:
        return [entry["item"] for entry in self.results]

    @property
    def left(self) -> list[str]:
        named = next((entry["items"] for entry in self._entries if "items" in entry), [])
        return [name for name in named if name not in self.done]

    @property
    def under_way(self) -> dict[str, Any] | None:
        """The item that began last, if it has not ended."""
        entries = self._entries
        return entries[-1] if entries and entries[-1].get("state") == "began" else None

    def under_way_since(self, seconds: float) -> bool:
        entry = self.under_way
        return entry is not None and time.time() - entry["at"] > seconds

    def close(self, state: str, reason: str) -> None:
        """Record what the item under way came to: its process is gone."""
        entry = self.under_way
        seconds = round(time.time() - entry["at"], 2)
        outcome = {"item": entry["item"], "seconds": seconds, "state": state, "reason": reason}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(outcome) + "\n")


def _junit(report: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Counts by outcome, and the first line of what each failure says."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error")), None)
        if wrong is not None:
            counts["failed"] += 1
            message = (wrong.get("message") or wrong.text or "no message").strip().splitlines()[0]
            failures[f"{case.get('classname')}.{case.get('name')}"] = message[:300]
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts, failures


def _ended(status: int) -> str:
    if status == 0:
        return ""
    if status < 0:
        return f"it was ended by signal {-status} ({signal.Signals(-status).name})"
    return f"it ended with status {status}"


def _stop(process: subprocess.Popen, grace: float) -> None:
    """End the process and all that it has started; interrupt it first and wait so many seconds."""
    if grace and process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())
