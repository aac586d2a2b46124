"""What a report says of serving, from rows that can be checked by hand."""

from __future__ import annotations

import pytest

from report.collect import collect
from report.pages import markdown, page
from report.serving import serving
from session import terminal_lines


def row(load: float, p95: float, refused: int = 0, others: float = 0.0) -> dict:
    """40 requests at ten times the load a second."""
    latency = {"p50": 0.5 * p95, "p95": p95, "p99": 1.5 * p95, "most": 1.5 * p95}
    ends = {"requests": 40, "answered": 40 - refused, "refused": refused, "failed": 0, "unanswered": 0}
    rates = {"load": load, "offered": 10 * load, "images_per_second": 9.5 * load}
    return {**rates, **ends, "latency": latency, "late": {"median": 1e-4, "most": 2e-3}, "others": others}


def turn(seconds: float, times: float) -> dict:
    return {"seconds": {"median": seconds, "fastest": seconds, "slowest": seconds, "rounds": 3}, "times": times,
            "parts": {}}  # fmt: skip


@pytest.fixture
def info() -> dict:
    """An image alone takes 0.1 s."""
    loads = {
        "Engine": [row(0.5, 0.15), row(1.0, 0.25), row(2.0, 0.9)],
        "one at a time": [row(0.5, 0.2), row(0.85, 0.45)],
        "static batches": [row(0.5, 0.4), row(2.0, 0.8, refused=10)],
    }
    stopped = dict.fromkeys(loads, "the highest load of the plan") | {"static batches": "10 of 40 <refused>"}
    return {
        "kind": "serving",
        "contenders": {"pipe()": turn(1.0, 1.0), "Engine": turn(1.04, 1.04)},
        "missing": {},
        "others": 0.0,
        "gpu": None,
        "model": "b",
        "precision": "weights int8, decode int8",
        "layers": 24,
        "solo": 0.1,
        "images": 10,
        "outstanding": 32,
        "slowest": 20.0,
        "same": {"compared": 90, "rounded": 5, "levels": 1},
        "loads": loads,
        "stopped": stopped,
    }


@pytest.fixture
def data(info) -> dict:
    machine = {
        "device": "cpu",
        "name": "Some CPU",
        "cpu": {"model": "Some CPU", "cores": 2, "isa": "avx2", "amx": False},
        "threads": 2,
        "python": "3.11",
        "alitok_fast": "0.1.0",
        "packages": {},
    }
    run = {"full": True, "partial": True, "command": "pytest", "seconds": 61, "machine": machine, "ceilings": None}
    return {
        "datetime": "2026-11-25T12:00:00",
        "benchmarks": [{"name": "bench_serving[b-int8]", "extra_info": info}],
        "alitok_fast": {**run, "skipped": {}, "failed": {}},
    }


def test_the_tables_of_serving(data):
    loads, held, alone = serving(collect(data)).tables
    assert loads.header[:2] == ("**B, weights int8, decode int8, 100 ms alone**", "load")
    assert loads.rows[0] == (
        "**Engine**", "0.5x", "5", "4.75", "75 ms", "150 ms", "225 ms", "40", "0", "100 us, 2 ms",
    )  # fmt: skip
    assert loads.rows[-1] == (
        "static batches", "2x", "20", "19", "400 ms", "800 ms", "1.2 s", "40", "10", "100 us, 2 ms",
    )  # fmt: skip
    assert held.header[1:3] == ("p95 <= 2x (200 ms)", "p95 <= 3x (300 ms)")
    assert held.rows == [
        ("**Engine**", "4.75", "9.5", "9.5", "19"),
        ("one at a time", "4.75", "4.75", "8.07", "8.07"),
        ("static batches", "none", "none", "4.75", "4.75"),  # a load with refused requests is not held
        ("Engine / one at a time", "1x", "2x", "1.18x", "2.35x"),
        ("Engine / static batches", "-", "-", "2x", "4x"),
    ]
    assert alone.rows == [("B, weights int8, decode int8", "100 ms", "104 ms", "1.04x", "3 of 10")]


def test_the_pages_of_serving(data):
    text = markdown(collect(data))
    assert "static batches of B, weights int8, decode int8 after 2x (10 of 40 <refused>)" in text
    assert "pixels of 5 differed by up to 1 of 255 grey levels" in text
    assert "32 wait for their answers" in text and "p95 passes 20x" in text and "busy" not in text
    html = page(collect(data))
    assert html.count("<figure><svg") == html.count("<figcaption>") == 1 and "&lt;refused&gt;" in html


def test_a_load_without_answers_has_a_row(data, info):
    info["loads"]["one at a time"][1] |= {"latency": None, "images_per_second": 0.0, "answered": 0, "refused": 40}
    loads, held, _ = serving(collect(data)).tables
    assert loads.rows[4][3:9] == ("0.0", "-", "-", "-", "40", "40")
    assert held.rows[1] == ("one at a time", "4.75", "4.75", "4.75", "4.75")
    assert page(collect(data)).count("<figure><svg") == 1


def test_what_disturbed_a_load_is_said_at_the_top(data, info):
    info["loads"]["Engine"][1]["others"] = 0.9
    top = markdown(collect(data)).partition("## Serving")[0]
    assert "busy** during 1 of 1 benchmarks" in top and "serving[b-int8]" in top


def test_serving_in_the_terminal(info):
    first, *others = terminal_lines("bench_serving[b-int8]", info)
    assert first == (
        "bench_serving[b-int8]: a request alone 100 ms with pipe(), 1.04x with Engine; images/s with p95 within 10x "
        "that: Engine 19, one at a time 8.07, static batches 4.75"
    )
    assert others[2] == "    static batches: 2x none, 3x none, 5x 4.75, 10x 4.75; up to load 2x, 10 of 40 <refused>"
