"""Parts of the GPU check: its plan, numbers and floors, what is read from tools, the carried binary, pages, logs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from ceilings import Ceilings
from gpu import build, pages, plan, runner, tools
from gpu.items import Context, Number, Skipped, within
from gpu.plan import STEPS

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def test_parts_are_the_steps():
    assert {step.part for step in STEPS} == set(plan.PARTS)
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        assert bool(step.module) != bool(step.tests)
        assert step.item_limit <= step.limit
        assert all((ROOT / path).exists() for path in step.tests), "moved?"


def test_nan_is_within_no_bound():
    with pytest.raises(AssertionError, match="error: expected at most 1"):
        within("error", float("nan"), 1.0)
    assert within("error", 0.0, 0.0).to_dict()["value"] == 0.0


def test_floors_are_the_larger_of_bytes_and_operations():
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
    assert build.carried(CPU) is None
    name = build.extension_file().name
    manifest = {"sources": build.kernel_sources(), "binary": name, "architecture": "90-real"}
    (tmp_path / build.MANIFEST).write_text(json.dumps({**manifest, "sources": "0123"}))
    (tmp_path / name).write_bytes(b"binary")
    assert build.carried(CPU) is None
    (tmp_path / build.MANIFEST).write_text(json.dumps(manifest))
    assert build.carried(CPU) == tmp_path / name
    for gpu, found in (((9, 0), tmp_path / name), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, gpu=gpu: gpu)
        assert build.carried(torch.device("cuda")) == found
    (tmp_path / name).rename(tmp_path / "_C.cpython-399.so")
    assert build.carried(CPU) is None


def test_the_carried_binary_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "CARRIED", tmp_path / "carried")
    target = tmp_path / f"_C{build.extension_file().name.removeprefix('_C')}"
    monkeypatch.setattr(build, "extension_file", lambda: target)
    build.CARRIED.mkdir()
    (build.CARRIED / target.name).write_bytes(b"binary")
    manifest = {"sources": build.kernel_sources(), "binary": target.name, "architecture": "90-real"}
    (build.CARRIED / build.MANIFEST).write_text(json.dumps(manifest))
    (number,) = build.extension(Context(torch.device("cpu"), True, None))
    assert number.key == "copied" and target.read_bytes() == b"binary"
    with pytest.raises(Skipped, match="is there"):  # a rehearsal leaves what is installed alone
        build.extension(Context(CPU, True, None))


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
