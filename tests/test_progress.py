"""Progress with a clock of our own: time left after slow batches, lines where there is no terminal."""

from __future__ import annotations

import re

import pytest

from alitok_fast import progress
from alitok_fast.progress import Bar, tracked


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


def test_the_time_left_is_known_after_one_slow_batch(clock):
    bar = Bar("sampling", 132, start=4, enabled=False)
    assert bar.left == "-:--:--"
    clock.now += 42
    bar.advance(by=32)
    assert bar.left == "0:02:06"  # 96 images at 32 in 42 s
    clock.now += 40
    assert bar.left == "0:01:26"
    clock.now += 3600
    assert bar.left == "0:00:00"
    bar.advance(by=96)
    assert bar.left == "0:00:00"


def test_the_bar_of_a_terminal_shows_it(clock, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Bar("sampling", 128) as bar:
        for _ in range(2):
            clock.now += 42
            bar.advance({"loss": 0.5}, by=32)
    out, err = capsys.readouterr()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert out == "" and "64/128" in text and "0:01:24" in text and "loss 0.5" in text


def test_lines_without_a_terminal(clock, capsys):
    with Bar("sampling", 50_000) as bar:
        for _ in range(8):
            clock.now += 12
            bar.advance(by=16)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "sampling: 48/50000, 1.33/s, 10:24:24 left",
        "sampling: 96/50000, 1.33/s, 10:23:48 left",
    ]


def test_lines_have_the_figures_and_come_after_each_slow_step(clock, capsys):
    with Bar("train", 3) as bar:
        for step in range(3):
            clock.now += 42
            bar.advance({"loss": 1 / (step + 1)})
    assert capsys.readouterr().err.splitlines() == [
        "train: 1/3, 0.0238/s, 0:01:24 left, loss 1",
        "train: 2/3, 0.0238/s, 0:00:42 left, loss 0.5",
        "train: 3/3, 0.0238/s, 0:00:00 left, loss 0.3333",
    ]


def test_silence_when_it_is_asked_for_or_soon_over(clock, capsys):
    for enabled, seconds in ((False, 100), (True, 3)):
        with Bar("sampling", 3, enabled=enabled) as bar:
            for _ in range(3):
                clock.now += seconds
                bar.advance()
    assert capsys.readouterr() == ("", "")


def test_items_of_unknown_number(clock, capsys):
    def slowly():
        for i in range(2):
            clock.now += 31
            yield i

    assert list(tracked("tokenize", slowly())) == [0, 1]
    assert capsys.readouterr().err.splitlines()[-1] == "tokenize: 2, 0.0323/s"


def test_every_line_has_the_last_known_figures(clock, capsys):
    with Bar("train", 4) as bar:
        for figures in ({"loss": 2.0, "usage": 0.5}, {"loss": 1.0}, None, {"loss": 0.5}):
            clock.now += 40
            bar.advance(figures)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == [
        "loss 2 usage 0.5",
        "loss 1 usage 0.5",
        "loss 1 usage 0.5",
        "loss 0.5 usage 0.5",
    ]
