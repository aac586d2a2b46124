"""The commands of `benchmarks/report`, and a small run of the suite, as a user calls them."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARKERS = "# Title\n\n<!-- speed: filled by `python benchmarks/report --readme` -->\n<!-- end of speed -->\n\nrest\n"


def environment() -> dict[str, str]:
    """This process's, without what tells pytest-benchmark not to measure: that it is in a worker of xdist."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )


def result(seconds: float, times: float, **facts) -> dict:
    spread = {"median": seconds, "fastest": 0.9 * seconds, "slowest": 1.2 * seconds, "rounds": 3}
    return {"seconds": spread, "times": times, "parts": {}, **facts}


def entry(name: str, kind: str, contenders: dict, missing: dict | None = None, **facts) -> dict:
    info = {"kind": kind, "contenders": contenders, "missing": missing or {}, "others": 0.0, "gpu": None, **facts}
    return {"name": f"bench_{name}", "extra_info": info}


@pytest.fixture
def measured() -> dict:
    """The JSON of a full run: B at batch 1 takes 2 s, the reference 28 s, a diffusion step 0.25 s, one-step generators'
    passes 0.02 s and 1 s, and the decode that is theirs too 1.5 s."""
    own = {"own": True, "draw": 0.1, "floor": {"tokens": 0.7, "stage-2 decode": 0.3}}
    own["parts"] = {"tokens": 1.4, "stage-2 decode": 0.6}
    reference = {"own": False, "parts": {"tokens": 26.0, "stage-2 decode": 2.0}}
    images = {
        "alitok_fast int8": {**result(2.0, 1.0), **own},
        "reference, fp32": {**result(28.0, 14.0), **reference},
    }
    missing = {"reference, bf16 autocast": "left out <on purpose>"}
    operator = {"alitok_fast": result(0.002, 1.0), "formula": result(0.008, 4.0)}
    memory = {"slowest": 3.5e10, "fastest": 4.1e10}
    diffusion = {
        "step": result(0.25, 1.0),
        "DiT-B/2, one step": result(0.02, 0.08, model="DiT-B/2", layers=12, steps=1),
        "DiT-XL/2, one step": result(1.0, 4.0, model="DiT-XL/2", layers=28, steps=1),
        "VAE decode": result(1.5, 6.0),
    }
    return {
        "datetime": "2026-11-25T12:00:00",
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [
            entry("sampling[b-1]", "image", images, missing, size="b", batch=1, layers=24, read_bytes=memory),
            entry("diffusion[1]", "diffusion", diffusion, batch=1, steps=250, layers=28),
            entry("forward[256]", "operator", operator, work=1e9, unit="fp32_flops", ceiling=1e12),
        ],
        "alitok_fast": {
            "full": True,
            "partial": False,
            "command": "pytest benchmarks/ --benchmark",
            "seconds": 61,
            "machine": {
                "device": "cpu",
                "name": "Some CPU",
                "cpu": {"model": "Some CPU", "cores": 2, "isa": "avx2", "amx": False},
                "threads": 2,
                "load_before": 0.0,
                "python": "3.11",
                "alitok_fast": "0.1.0",
                "packages": {"torch": "2.13.0"},
            },
            "ceilings": {"fp32_flops": 1e12, "read_bytes": 4e10},
            "skipped": {"bench_x.py::bench_x": "not here"},
            "failed": {},
        },
    }


@pytest.fixture
def reports(tmp_path, measured) -> Path:
    folder = tmp_path / "reports" / "some-cpu-2-threads"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(measured))
    return folder.parent


def test_pages_from_a_json(reports):
    source = reports / "some-cpu-2-threads" / "report.json"
    done = command("benchmarks/report", source)
    assert done.returncode == 0, done.stderr
    text = source.with_name("report.md").read_text()
    row = next(line for line in text.splitlines() if "**alitok_fast int8**" in line)
    assert [cell.strip() for cell in row.split("|")[2:8]] == [
        "2 s (1.8 s to 2.4 s, 3 rounds)", "2 s", "0.5", "1 s", "50%", "1x",
    ]  # fmt: skip
    assert "| 14x |" in text
    assert "| memory, between the rounds | 35 to 41 GB/s |" in text
    assert re.search(r"B, batch 1 \| alitok_fast int8 \| 1\.3 s \| 100 ms \|  \| 600 ms", text)
    assert re.search(r"DiT-XL/2, 250 steps, bf16 \| 1 \| 64 s", text), "250 x 0.25 s + 1.5 s"
    assert "32x" in text
    assert "forward[256]" in text and "500 GFLOP/s" in text and "formula 4x (3)" in text
    for reason in ("left out <on purpose>", "not here"):
        assert reason in text
    assert "busy" not in text and "Quick run" not in text


def beside_diffusion(source: Path) -> tuple[str, list[list[str]]]:
    """The section's text, and the cells of its table's rows below the header."""
    done = command("benchmarks/report", source)
    assert done.returncode == 0, done.stderr
    text = source.with_name("report.md").read_text().partition("## Beside diffusion")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return text, rows[2:]


def test_one_step_generators_are_beside_ours_also_where_they_are_faster(reports):
    text, rows = beside_diffusion(reports / "some-cpu-2-threads" / "report.json")
    assert rows == [
        ["DiT-XL/2, 250 steps, bf16", "1", "64 s (57.6 s to 76.8 s, 3 rounds)", "64 s", "", "", ""],
        ["DiT-B/2, one step, bf16", "1", "1.52 s (1.37 s to 1.82 s, 3 rounds)", "1.52 s", "", "", ""],
        ["DiT-XL/2, one step, bf16", "1", "2.5 s (2.25 s to 3 s, 3 rounds)", "2.5 s", "", "", ""],
        ["**alitok_fast int8 B**", "1", "2 s (1.8 s to 2.4 s, 3 rounds)", "2 s", "32x", "0.76x", "1.25x"],
    ]
    assert "**Faster than every one of ours at that batch:** DiT-B/2, one step, bf16 (batch 1).\n" in text


def test_a_one_step_generator_cut_short_is_not_compared(reports, measured):
    source = reports / "some-cpu-2-threads" / "report.json"
    measured["benchmarks"][1]["extra_info"]["contenders"]["DiT-B/2, one step"]["layers"] = 4
    source.write_text(json.dumps(measured))
    text, rows = beside_diffusion(source)
    assert rows[1][0] == "DiT-B/2, one step, bf16 **(cut to a few layers)**" and rows[-1][4:] == ["32x", "", "1.25x"]
    assert "Faster than" not in text


def test_reports_from_before_one_step_generators_were_measured(tmp_path, reports, measured):
    source, readme = reports / "some-cpu-2-threads" / "report.json", tmp_path / "README.md"
    contenders = measured["benchmarks"][1]["extra_info"]["contenders"]
    measured["benchmarks"][1]["extra_info"]["contenders"] = {n: contenders[n] for n in ("step", "VAE decode")}
    source.write_text(json.dumps(measured))
    text, rows = beside_diffusion(source)
    assert [row[4:] for row in rows] == [[""], ["32x"]] and "generators" not in text
    readme.write_text(MARKERS)
    assert command("benchmarks/report", "--readme", readme, "--reports", reports).returncode == 0
    assert "| 14x | - | - | 32x | - |\n" in readme.read_text()


def test_the_html_page_stands_alone(reports):
    source = reports / "some-cpu-2-threads" / "report.json"
    assert command("benchmarks/report", source, "--out", reports / "out").returncode == 0
    page = (reports / "out" / "report.html").read_text()
    assert page.count("<figure><svg") == page.count("<figcaption>") == 4
    assert "left out &lt;on purpose&gt;" in page
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)", page)
    assert set(re.findall(r'href="(?!#)[^"]*"', page)) == set()


def test_warnings_are_at_the_top(reports, measured):
    source = reports / "some-cpu-2-threads" / "report.json"
    measured["alitok_fast"]["full"] = False
    measured["alitok_fast"]["failed"] = {"bench_y.py::bench_y": "AssertionError"}
    measured["benchmarks"][0]["extra_info"] |= {"others": 0.9, "layers": 4}
    source.write_text(json.dumps(measured))
    assert command("benchmarks/report", source).returncode == 0
    top, _, rest = source.with_name("report.md").read_text().partition("## Whole images")
    assert "Quick run" in top and "1 checks failed" in top
    assert "busy** during 1 of 3 benchmarks" in top and "sampling[b-1]" in top
    assert "Shares above 100%" not in top
    assert "32x" not in rest, "a model cut short is not compared with diffusion"


def test_pages_say_what_of_a_gpu_was_not_read(reports, measured):
    source, seen = reports / "some-cpu-2-threads" / "report.json", {"before": 1, "median": 2, "least": 1, "most": 3}
    some = {"sm_mhz": seen, "samples": 2, "throttling": [], "unread": {"watts": "NVML: Not Supported"}}
    none = {"samples": 0, "throttling": None, "unread": {"everything": "NVML: Driver Not Loaded"}}
    earlier = {key: seen for key in ("sm_mhz", "memory_mhz", "watts", "celsius")} | {"throttling": ["power cap"]}
    for bench, gpu in zip(measured["benchmarks"], (some, none, earlier), strict=True):
        bench["extra_info"]["gpu"] = gpu
    source.write_text(json.dumps(measured))
    done = command("benchmarks/report", source)
    assert done.returncode == 0, done.stderr
    text = source.with_name("report.md").read_text()
    assert "| sampling[b-1] | 2 (1 to 3) | not read | not read | not read | none |" in text
    assert "| diffusion[1] | not read | not read | not read | not read | not read |" in text
    assert "| forward[256] | 2 (1 to 3) | 2 (1 to 3) | 2 (1 to 3) | 2 (1 to 3) | power cap |" in text
    assert "**Not read:** power, W (NVML: Not Supported); everything (NVML: Driver Not Loaded)." in text


def test_shares_above_the_floor_are_pointed_out(reports, measured):
    source = reports / "some-cpu-2-threads" / "report.json"
    measured["benchmarks"][0]["extra_info"]["contenders"]["alitok_fast int8"]["floor"]["tokens"] = 3.0
    source.write_text(json.dumps(measured))
    assert command("benchmarks/report", source).returncode == 0
    assert "**Shares above 100%** in alitok_fast int8 B 1" in source.with_name("report.md").read_text()


@pytest.mark.parametrize("text", ["{}", "not JSON"])
def test_another_json_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    done = command("benchmarks/report", tmp_path / "x.json")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_the_readme_is_filled_from_full_reports(tmp_path, reports, measured):
    quick = copy.deepcopy(measured)
    quick["alitok_fast"]["full"] = False
    (reports / "some-cpu-2-threads-quick").mkdir()
    (reports / "some-cpu-2-threads-quick" / "report.json").write_text(json.dumps(quick))
    readme = tmp_path / "README.md"
    readme.write_text(MARKERS)
    fill = ("benchmarks/report", "--readme", readme, "--reports", reports)
    assert command(*fill, "--check").returncode == 1
    assert readme.read_text() == MARKERS
    assert command(*fill).returncode == 0
    rows = [line for line in readme.read_text().splitlines() if line.startswith("| [")]
    link = "[Some CPU, 2 threads](reports/some-cpu-2-threads/report.md)"
    assert rows == [f"| {link} | B | 1 | **2 s** (int8) | 50% | 14x | - | - | 32x | 1.25x |"]
    assert readme.read_text().endswith("<!-- end of speed -->\n\nrest\n")
    assert command(*fill, "--check").returncode == 0


def test_a_readme_without_markers_is_left_alone(tmp_path, reports):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    done = command("benchmarks/report", "--readme", readme, "--reports", reports)
    assert done.returncode == 2 and "markers" in done.stderr
    assert readme.read_text() == "nothing"


def test_the_readme_holds_the_committed_reports():
    done = command("benchmarks/report", "--readme", "--check")
    assert done.returncode == 0, done.stderr


def test_a_part_of_the_suite_writes_a_report_where_told(tmp_path):
    run = ("-m", "pytest", "-q", "benchmarks/bench_sample_tokens.py", "-k", "all-1", "--benchmark", "--quick")
    done = command(*run, "--report-dir", tmp_path / "part")
    assert done.returncode == 0, done.stdout
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["report.html", "report.json", "report.md"]
    data = json.loads((tmp_path / "part" / "report.json").read_text())
    assert data["alitok_fast"]["partial"] and data["alitok_fast"]["ceilings"]["read_bytes"] > 0
    assert "node" not in data["machine_info"]
    (bench,) = data["benchmarks"]
    contenders = bench["extra_info"]["contenders"]
    assert list(contenders)[0] == "alitok_fast" and len(contenders) > 1
    assert len(bench["stats"]["data"]) == contenders["alitok_fast"]["seconds"]["rounds"]
    assert "Part of the benchmarks only" in (tmp_path / "part" / "report.md").read_text()


STOPPER = """
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if "all-8" in item.name:
        raise KeyboardInterrupt
"""


def test_a_run_that_is_stopped_reports_what_it_has(tmp_path):
    (tmp_path / "stopper.py").write_text(STOPPER)  # Ctrl-C at the second benchmark
    run = ("-p", "stopper", "benchmarks/bench_sample_tokens.py", "-k", "all-1 or all-8", "--benchmark", "--quick")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *run, "--report-dir", tmp_path / "stopped"],
        cwd=ROOT, env={**environment(), "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout  # interrupted
    data = json.loads((tmp_path / "stopped" / "report.json").read_text())
    stopped = [name for name, why in data["alitok_fast"]["skipped"].items() if "the run was stopped" in why]
    assert len(data["benchmarks"]) == 1 and stopped == ["bench_sample_tokens.py::bench_sample_tokens[all-8]"]
    assert stopped[0] in (tmp_path / "stopped" / "report.md").read_text()


def test_the_table_of_gpus_takes_what_was_not_repeated_from_the_first_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from report import gpu_table

    def results(folder, numbers, **changes):
        items = [{"item": "x", "state": "passed", "numbers": [{"name": n, **values} for n, values in numbers.items()]}]
        data = {"device": "GPU", "rehearsal": False, "quick": False, "steps": [{"items": items}], **changes}
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "gpu_check.json").write_text(json.dumps(data))

    step = {"B x 24 layers, batch 8, bf16: a step": {"value": 0.5, "share": 0.25}}
    images = {"batch 8, alitok_fast bf16: images": {"value": 0.16}, "batch 8: reference, fp32 takes": {"value": 30.0}}
    earlier = {"step, eager": 0.032, "step, graph": 0.016, "VAE decode": 0.0, "one step and VAE decode": 0.04}
    results("gpu", step | images)
    results("gpu-first", {f"batch 8, {name}": {"value": value} for name, value in earlier.items()})
    results("rehearsed", step | images, rehearsal=True)
    rows = [line for line in gpu_table.table(tmp_path, tmp_path).splitlines() if line.startswith("| [")]
    assert rows == ["| [GPU](gpu/gpu_check.md) | 8 | **20 ms** | 0.5 ms | 25% | 30x | - | 50x‡ | 25x‡ | 0.25x‡ |"]
    assert gpu_table.table(tmp_path / "none", tmp_path) == gpu_table.NONE
