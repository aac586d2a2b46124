"""Steps of the GPU check that are wrong, hang or crash, each planted here: they cost themselves alone."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu import pages, runner
from gpu.plan import Step
from gpu.runner import Runner

PLANTED = """
import ctypes, os, subprocess, sys, time
from pathlib import Path
import torch
from gpu.items import Items, Number, Skipped, within

items = Items()

@items("good, for one")
def good(context):
    return [context.timed("a second", [1.0], read=1e9, key="good")]

@items("wrong")
def wrong(context):
    return [within("error", float("nan"), 1.0)]

@items("hangs")
def hangs(context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["PLANTED_PID"]).write_text(str(child.pid))
    time.sleep(600)

@items("crashes")
def crashes(context):
    ctypes.string_at(0)

@items("leaves")
def leaves(context):
    os._exit(3)

@items("for a GPU", gpu=True)
def for_a_gpu(context):
    raise AssertionError("must not run on the CPU")

@items("last")
def last(context):
    return []

if __name__ == "__main__":
    items.main()
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """run(*items, **settings) -> the result of a step with these items of PLANTED."""
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "planted.py").write_text(PLANTED)
    (folder / "broken.py").write_text("raise ImportError('no such thing')\n")

    def run(*items: str, module="planted", limit=60.0, item_limit=20.0, minutes=1.0, tests=()):
        environment = {"PYTHONPATH": str(folder), "PLANTED_PID": str(tmp_path / "pid")}
        one = Runner("cpu", True, tmp_path, time.monotonic() + 60 * minutes, environment)
        one.ceilings.write_text(json.dumps(dict(fp32_flops=1e9, bf16_flops=1e9, int8_flops=1e9, read_bytes=2e9)))
        return one.run(Step("planted", "ops", limit, item_limit, "" if tests else module, tests, items))

    return run


@pytest.fixture
def time_flies(tmp_path, monkeypatch):
    """A thousand seconds pass as soon as what hangs has begun: limits come, however long a process takes to start."""

    def now() -> float:
        return time.monotonic() + (1000 if (tmp_path / "pid").exists() else 0)

    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=now, time=time.time, sleep=time.sleep))


def states(result) -> dict[str, str]:
    return {item["item"]: item["state"] for item in result.items}


def test_items_are_recorded_with_their_floors(planted):
    result = planted("good, for one", "for a GPU", "last")
    assert (result.state, result.reason) == ("passed", "")
    assert states(result) == {"good, for one": "passed", "for a GPU": "skipped", "last": "passed"}
    (number,) = result.items[0]["numbers"]
    assert number == {
        "name": "a second", "value": 1000.0, "unit": "ms", "floor": 500.0, "floor_is": "bytes / bandwidth",
        "share": 0.5, "key": "good", "spread": [1000.0, 1000.0, 1],
    }  # fmt: skip
    assert pages.summary(result) == "good 1000 ms (50% of floor), skipped 1 of 3 items: needs a GPU"


def test_a_wrong_item_fails_alone(planted):
    result = planted("wrong", "good, for one")
    assert result.state == "failed"
    assert result.reason == "wrong: AssertionError: error: expected at most 1 (relative), got nan"
    assert states(result) == {"wrong": "failed", "good, for one": "passed"}


def test_a_crash_costs_its_item(planted):
    result = planted("good, for one", "crashes", "leaves", "last")
    assert result.state == "failed"
    assert result.reason == "crashes: it was ended by signal 11 (SIGSEGV)"
    assert states(result) == {"good, for one": "passed", "crashes": "failed", "leaves": "failed", "last": "passed"}
    assert result.items[2]["reason"] == "it ended with status 3"


def test_a_hang_costs_its_limit_and_what_it_started_is_ended(planted, tmp_path):
    begin = time.monotonic()
    result = planted("hangs", "last", item_limit=4.0)
    assert time.monotonic() - begin < 40
    assert result.reason == "hangs: it did not end within 4 s"
    assert states(result) == {"hangs": "failed", "last": "passed"}
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 5
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or status.read_text().split()[2] == "Z", "its child goes on"


def test_a_steps_own_limit_leaves_its_rest(planted, time_flies):
    result = planted("hangs", "last", minutes=100)
    assert result.state == "failed"
    assert result.reason == "hangs: its step did not end within 60 s"
    assert states(result) == {"hangs": "failed", "last": "not run"}


def test_without_time_nothing_fails(planted, time_flies):
    assert planted("good, for one", minutes=0).state == "not run"
    result = planted("hangs", "last", limit=10_000)
    assert (result.state, result.reason) == ("not run", "2 of 2 items: no time was left")


def test_a_step_that_does_not_begin_says_why(planted):
    result = planted(module="broken")
    assert result.state == "failed"
    assert result.reason == "it ended with status 1; its log ends: ImportError: no such thing"


@pytest.fixture
def planted_tests(planted, tmp_path, monkeypatch):
    """run(text, **settings) -> the result of a step that is pytest over a file with this text."""

    def run(text: str, **settings):
        file = tmp_path / "test_planted.py"
        file.write_text(text)
        options = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file)]
        monkeypatch.setattr(runner, "pytest_arguments", lambda step, cuda, junit: [*options, f"--junitxml={junit}"])
        return planted(tests=(str(file),), **settings)

    return run


WRONG_TEST = "import time\n\ndef test_wrong():\n    assert 1 == 2\n\n"


def test_failing_tests_are_named(planted_tests):
    result = planted_tests(WRONG_TEST + "def test_good():\n    pass\n")
    assert result.state == "failed"
    assert result.reason == "1 failed; test_planted.test_wrong: assert 1 == 2"
    assert [number["value"] for number in result.items[0]["numbers"]] == [1, 1, 0]


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_pytest_may_write_what_it_has_when_its_limit_comes(planted_tests, time_flies, handler):
    before = signal.signal(signal.SIGINT, handler)
    begun = "    open(os.environ['PLANTED_PID'], 'w').close()\n"
    result = planted_tests(f"import os\n{WRONG_TEST}def test_hangs():\n{begun}    time.sleep(600)\n", minutes=100)
    signal.signal(signal.SIGINT, before)
    assert result.state == "failed"
    assert result.reason == "1 failed; test_planted.test_wrong: assert 1 == 2"
