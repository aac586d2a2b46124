"""The GPU check as a whole, without a GPU: its rehearsal, what it writes, its exit status."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import sysconfig
import time

import pytest
import torch

import gpu_check
from gpu import runner
from gpu.plan import STEPS, Step
from gpu.runner import Runner


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The whole check as a user without a GPU runs it: folder, status and output."""
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, gpu_check.__file__, "--device", "cpu", "--quick", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    return folder, done.returncode, done.stdout + done.stderr


@pytest.mark.slow
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
    assert only_there == {"memcheck", "racecheck", "Nsight Compute"}


@pytest.mark.slow
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


@pytest.mark.slow
def test_its_table_fits_a_screen_and_says_what_it_is(rehearsal):
    folder, _, output = rehearsal
    table = output[output.index("Rehearsal of") :].strip().splitlines()
    assert len(table) <= 24 and max(map(len, table)) <= 120
    assert "No GPU has run this." in table[-1]
    assert sorted(file.name for file in folder.iterdir()) == ["gpu_check.json", "gpu_check.log.gz", "gpu_check.md"]
    assert "No GPU has run this." in (folder / "gpu_check.md").read_text()
    log = gzip.decompress((folder / "gpu_check.log.gz").read_bytes()).decode()
    assert all(f"======== {runner._slug(step.name)} ========" in log for step in STEPS)


@pytest.mark.slow
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
