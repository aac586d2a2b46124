"""The GPU check without a GPU: its rehearsal, and that a step which is wrong, hangs or crashes costs itself alone."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpu_check
from gpu import build, pages, plan, runner, tools
from gpu.items import Context, Number, within
from gpu.plan import STEPS, Step
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


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The whole check as a user without a GPU runs it: folder, status and output."""
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, gpu_check.__file__, "--device", "cpu", "--quick", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    return folder, done.returncode, done.stdout + done.stderr


def test_the_rehearsal_runs_every_step(rehearsal):
    folder, status, output = rehearsal
    data = json.loads((folder / "gpu_check.json").read_text())
    assert status == 0, output
    assert [step["name"] for step in data["steps"]] == [step.name for step in STEPS]
    assert data["rehearsal"] and data["quick"]
    for step in data["steps"]:
        assert step["state"] in ("passed", "skipped"), step
        for item in step["items"]:
            assert item["state"] == "passed" or item["reason"], item
    only_there = {step["name"] for step in data["steps"] if step["state"] == "skipped"}
    assert only_there == {"compute-sanitizer", "Nsight Compute"}


def test_its_times_have_floors_and_shares(rehearsal):
    folder, _, _ = rehearsal
    steps = json.loads((folder / "gpu_check.json").read_text())["steps"]
    numbers = [number for step in steps for item in step["items"] for number in item.get("numbers", [])]
    assert len(numbers) > 60
    for number in numbers:
        assert number["unit"], number
        if number["unit"] in ("ms", "us"):
            assert number["floor"] > 0 and number["floor_is"], number
            assert number["share"] == pytest.approx(number["floor"] / number["value"]), number


def test_its_table_fits_a_screen_and_says_what_it_is(rehearsal):
    folder, _, output = rehearsal
    table = output[output.index("Rehearsal of") :].strip().splitlines()
    assert len(table) <= 24 and max(map(len, table)) <= 120
    assert "No GPU has run this." in table[-1]
    assert sorted(file.name for file in folder.iterdir()) == ["gpu_check.json", "gpu_check.log.gz", "gpu_check.md"]
    assert "No GPU has run this." in (folder / "gpu_check.md").read_text()
    log = gzip.decompress((folder / "gpu_check.log.gz").read_bytes()).decode()
    assert all(f"======== {runner._slug(step.name)} ========" in log for step in STEPS)


def test_a_second_run_skips_what_passed(rehearsal, capsys, monkeypatch):
    folder, _, _ = rehearsal
    arguments = ["--device", "cpu", "--out", str(folder), "--only", "ops,models,operators"]
    ran = []
    monkeypatch.setattr(Runner, "run", lambda self, step: ran.append(step.name))
    assert gpu_check.main(arguments) == 0
    assert ran == []
    shown = capsys.readouterr().out
    assert "operators against definitions  passed *" in shown
    kept = [step["name"] for step in json.loads((folder / "gpu_check.json").read_text())["steps"]]
    assert kept == [step.name for step in STEPS], "what was not asked for now is still there"
    log = gzip.decompress((folder / "gpu_check.log.gz").read_bytes()).decode()
    assert all(f"======== {runner._slug(step.name)} ========\n$ " in log for step in STEPS)
    monkeypatch.setattr(gpu_check, "fingerprint", lambda: "other sources")
    with pytest.raises(AttributeError):  # the stand-in for a run has no result
        gpu_check.main(arguments)
    assert ran == ["torch alone"]


def a_check(monkeypatch, tmp_path, **results: str):
    """The exit status where steps come to these states."""
    steps = tuple(Step(name, "ops", 1, required=name != "optional") for name in results)
    monkeypatch.setattr(gpu_check, "STEPS", (STEPS[1], *steps))
    monkeypatch.setattr(gpu_check, "chosen", lambda parts: list(steps))
    monkeypatch.setattr(Runner, "run", lambda self, step: runner.Result(
        step.name, step.part, step.required, results.get(step.name, "passed"), reason="planted"))  # fmt: skip
    return gpu_check.main(["--device", "cpu", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (dict(first="passed", second="passed"), 0),
        (dict(first="passed", second="failed"), 1),
        (dict(first="passed", second="not run"), 1),
        (dict(first="passed", optional="not run"), 0),
        (dict(first="passed", optional="failed"), 1),
        (dict(first="passed", second="skipped"), 0),
    ],
)
def test_the_exit_status(monkeypatch, tmp_path, results, status):
    assert a_check(monkeypatch, tmp_path, **results) == status


def test_a_failed_build_is_the_end_of_what_needs_it(monkeypatch, tmp_path, capsys):
    assert a_check(monkeypatch, tmp_path, build="failed", first="passed") == 1
    shown = capsys.readouterr().out
    assert "NOT PROVEN: build" in shown


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', "not json"])
def test_a_damaged_result_is_as_none(monkeypatch, tmp_path, text):
    (tmp_path / "gpu_check.json").write_text(text)
    (tmp_path / "gpu_check.log.gz").write_text("not gzip")
    assert a_check(monkeypatch, tmp_path, first="passed") == 0
    assert json.loads((tmp_path / "gpu_check.json").read_text())["steps"][1]["name"] == "first"


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match="--out: expected a folder that can be written"):
        gpu_check.main(["--device", "cpu", "--out", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_is_ended_early_has_proven_nothing(monkeypatch, tmp_path):
    def ended(self, step):
        if step.name == "second":
            raise KeyboardInterrupt
        return runner.Result(step.name, step.part, True, "passed")

    steps = tuple(Step(name, "ops", 1, required=True) for name in ("first", "second"))
    monkeypatch.setattr(gpu_check, "STEPS", (STEPS[1], *steps))
    monkeypatch.setattr(gpu_check, "chosen", lambda parts: list(steps))
    monkeypatch.setattr(Runner, "run", ended)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--device", "cpu", "--out", str(tmp_path)])
    assert "NOT ENDED: 2 of 3 steps so far" in (tmp_path / "gpu_check.md").read_text()


def test_logs_are_unpacked_as_they_were(tmp_path):
    logs = {"one": b"a\nb\n", "two": b"", "three": b"======== no rule\n"}
    for name, text in logs.items():
        (tmp_path / f"{name}.log").write_bytes(text)
    pages.packed_log(tmp_path / "log.gz", [tmp_path / f"{name}.log" for name in logs])
    (tmp_path / "again").mkdir()
    pages.unpack_log(tmp_path / "log.gz", tmp_path / "again")
    assert {file.stem: file.read_bytes().strip() for file in (tmp_path / "again").iterdir()} == {
        name: text.strip() for name, text in logs.items()
    }
    pages.unpack_log(tmp_path / "missing.gz", tmp_path)
    (tmp_path / "broken.gz").write_bytes(b"not gzip")
    pages.unpack_log(tmp_path / "broken.gz", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "ops,nonsense"], "--only: expected parts out of build, ops,"),
        (["--minutes", "0"], "--minutes: expected a positive number, got 0"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--device", "cuda"])
    assert "--device cpu rehearses without one" in capsys.readouterr().err


def test_a_required_step_that_is_skipped_proves_nothing_on_a_gpu(tmp_path):
    given = gpu_check.options(["--device", "cpu", "--out", str(tmp_path)])
    check = gpu_check.Check(given, tmp_path)
    skipped = runner.Result("tests", "ops", True, "skipped")
    assert check._stands(skipped)
    check.about["rehearsal"] = False
    assert not check._stands(skipped)


def test_the_checkout_alone_is_enough(tmp_path):
    """Without .pth files (-S) an editable installation is not found, but what lies in site-packages is."""
    packages = sysconfig.get_paths()["purelib"]
    done = subprocess.run([sys.executable, "-S", gpu_check.__file__, "--help"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": packages})  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = Runner("cpu", True, tmp_path, time.monotonic() + 60, {"PYTHONPATH": packages})
    code = "import alitok_fast, gpu.items; print(alitok_fast.__file__)"
    assert one._process(STEPS[0], [sys.executable, "-S", "-c", code], time.monotonic() + 60, lambda: False) == ""
    assert str(gpu_check.ROOT / "alitok_fast") in one.log(STEPS[0]).read_text()


def test_parts_are_the_steps():
    assert {step.part for step in STEPS} == set(plan.PARTS)
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        assert bool(step.module) != bool(step.tests)
        assert step.item_limit <= step.limit


def test_nan_is_within_no_bound():
    with pytest.raises(AssertionError, match="error: expected at most 1"):
        within("error", float("nan"), 1.0)
    assert within("error", 0.0, 0.0).to_dict()["value"] == 0.0


def test_floors_are_the_larger_of_bytes_and_operations():
    from ceilings import Ceilings

    context = Context(torch.device("cpu"), True, Ceilings(1e12, 2e12, 2e12, 1e9))
    number = context.timed("x", [0.5, 0.25, 1.0], 10, read=1e6, flops=1e9, unit="us")
    assert (number.value, number.floor, number.floor_is) == (50_000.0, 1000.0, "bytes / bandwidth")
    assert context.timed("x", [1.0], read=1e3, flops=4e9).floor == 2.0
    assert context.timed("x", [1.0], least=0.25).share == 0.25


def test_what_ncu_prints_is_read():
    lines = [
        ("ID", "Kernel Name", "Block Size", "Grid Size", "Metric Name", "Metric Unit", "Metric Value"),
        ("0", "void forward_kernel<T, 48>(P)", "(128, 1, 1)", "(32, 3, 1)", "gpu__time_duration.sum", "ns", "12,345"),
        ("0", "void forward_kernel<T, 48>(P)", "(128, 1, 1)", "(32, 3, 1)", "launch__registers_per_thread", "", "168"),
    ]
    table = [",".join(f'"{cell}"' for cell in line) for line in lines]
    output = "\n".join(["--- prefix_attention bfloat16", "==PROF== Profiling", *table, "==PROF== Disconnected"])
    rows = tools.profiled(output)
    found = [(row["Metric Name"], row["Metric Value"]) for row in rows]
    assert found == [("gpu__time_duration.sum", "12,345"), ("launch__registers_per_thread", "168")]
    with pytest.raises(RuntimeError, match="ncu: expected a table of metrics"):
        tools.profiled("==ERROR== no permission")


def test_what_the_sanitizer_prints_is_read():
    pattern = r"RACECHECK SUMMARY: (\d+) hazard"
    assert tools.faults("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", pattern) == 2
    with pytest.raises(RuntimeError, match="expected a summary"):
        tools.faults("killed", pattern)


def test_a_carried_binary_must_be_of_these_sources_and_this_python(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "CARRIED", tmp_path)
    assert build.carried() is None
    name = build.extension_file().name
    manifest = {"sources": build.kernel_sources(), "binary": name}
    (tmp_path / build.MANIFEST).write_text(json.dumps({**manifest, "sources": "0123"}))
    (tmp_path / name).write_bytes(b"binary")
    assert build.carried() is None
    (tmp_path / build.MANIFEST).write_text(json.dumps(manifest))
    assert build.carried() == tmp_path / name
    (tmp_path / name).rename(tmp_path / "_C.cpython-399.so")
    assert build.carried() is None


def test_the_carried_binary_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "CARRIED", tmp_path / "carried")
    target = tmp_path / f"_C{build.extension_file().name.removeprefix('_C')}"
    monkeypatch.setattr(build, "extension_file", lambda: target)
    build.CARRIED.mkdir()
    (build.CARRIED / target.name).write_bytes(b"binary")
    manifest = {"sources": build.kernel_sources(), "binary": target.name}
    (build.CARRIED / build.MANIFEST).write_text(json.dumps(manifest))
    (number,) = build.extension(Context(torch.device("cpu"), True, None))
    assert number.key == "copied" and target.read_bytes() == b"binary"


def test_long_logs_are_cut_in_the_middle(tmp_path):
    log = tmp_path / "step.log"
    log.write_bytes(b"begin" + b"x" * (3 * pages.LOG_BYTES) + b"end")
    pages.packed_log(tmp_path / "log.gz", [log, tmp_path / "missing.log"])
    text = gzip.decompress((tmp_path / "log.gz").read_bytes())
    assert text.startswith(b"======== step ========\nbegin") and text.rstrip().endswith(b"end")
    assert b"bytes left out" in text and len(text) < 1.1 * pages.LOG_BYTES


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.0e12, "B/s", "3 TB/s"),
        (7.91e14, "FLOP/s", "791 TFLOP/s"),
        (1.306, "us", "1.31 us"),
        (7966.4, "us", "7966 us"),
        (0.571, "share", "57.1%"),
        (0, "count", "0 count"),
    ],
)
def test_quantities(value, unit, text):
    assert pages.quantity(value, unit) == text


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        (None, ""),
        ({"sm_mhz": {"median": 1980.0}, "watts": {"median": 421.6}, "throttling": ["power cap"], "unread": {}},
         "1980 MHz, 422 W, power cap"),
        ({"throttling": None, "unread": {"everything": "NVML: refused"}}, "everything not read (NVML: refused)"),
    ],
)  # fmt: skip
def test_what_the_gpu_did_meanwhile(seen, text):
    result = runner.Result("a", "ops", True, "passed", gpu=seen)
    assert pages._busy(result) == text
    assert text in pages.markdown("title", {}, [result], "verdict")


def test_numbers_as_plain_values():
    assert Number("x", 0.0, "count").to_dict() == {"name": "x", "value": 0.0, "unit": "count"}
