"""`alitok-fast data check`, and the options of where pictures come from."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from alitok_fast.cli.app import app
from alitok_fast.cli.data import SourceOptions
from alitok_fast.cli.options import with_options


@pytest.fixture
def photos(tmp_path: Path, jpegs) -> Path:
    for name, data in (("cat/a.jpg", jpegs[0]), ("dog/b.jpg", jpegs[1]), ("dog/c\x1b.jpg", jpegs[2][:400])):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data)
    return tmp_path / "photos"


def run(*arguments: object):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments), "--workers", "0", "--no-progress"])


def test_what_is_found_is_named_and_the_status_says_it(photos: Path, tmp_path: Path) -> None:
    result = run("--data", photos, "--out", tmp_path / "bad.txt")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[0] == "photos: 3 pictures in 2 classes"
    assert lines[1].startswith("truncated\tdog/c\\x1b.jpg\texpected a readable image, got OSError:")
    assert lines[2:] == ["3 pictures: 1 truncated", f"wrote {tmp_path / 'bad.txt'}: 1 sample to leave out"]
    again = run("--data", photos, "--skip-list", tmp_path / "bad.txt")
    assert again.exit_code == 0 and again.output.splitlines()[-1] == "2 pictures: nothing found"


def test_the_report_as_json(photos: Path, tmp_path: Path) -> None:
    result = run("--data", photos, "--json", "--tiny", 50, "--skip", "tiny", "--out", tmp_path / "bad.txt")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["readable"] and report["counts"] == {"truncated": 1, "tiny": 2}
    assert report["findings"][0] == {"kind": "tiny", "name": "cat/a.jpg", "detail": "60 x 48 pixels"}
    assert (report["pictures"], report["classes"], report["skipped"]) == (3, 2, 2)


@pytest.mark.slow
def test_several_processes_give_the_same_report(photos: Path) -> None:
    for number in range(200):
        (photos / "cat" / f"{number}.jpg").write_bytes(b"%d" % (number // 2))
    command = [sys.executable, "-m", "alitok_fast.cli", "data", "check", "--data", photos, "--json", "--no-progress"]
    reports = [
        subprocess.run([*command, "--workers", workers], capture_output=True, text=True) for workers in ("0", "2")
    ]
    assert reports[0].stdout == reports[1].stdout and json.loads(reports[0].stdout)["counts"]["duplicate"] == 100
    assert reports[0].returncode == reports[1].returncode == 1


@pytest.mark.slow
def test_after_ctrl_c_a_check_goes_on(tmp_path: Path, jpegs) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for number in range(5000):
        (tmp_path / "photos" / "cat" / f"{number}.jpg").write_bytes(
            jpegs[number % 4] * (number % 7 > 0) + b"%d" % (number % 4900)
        )
    command = [sys.executable, "-m", "alitok_fast.cli", "data", "check", "--data", tmp_path / "photos", "--no-progress"]
    command += ["--workers", "2", "--out"]
    log = tmp_path / "bad.txt.progress"
    process = subprocess.Popen([*command, tmp_path / "bad.txt"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not log.exists() or log.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stderr.read() == b"alitok-fast: interrupted\n"
    process.stderr.close()
    lines = log.read_text().splitlines()
    assert len(lines) > 1 and 0 < sum(len(json.loads(line)["seen"]) for line in lines[1:]) < 5000
    results = [subprocess.run([*command, tmp_path / name], capture_output=True) for name in ("bad.txt", "again.txt")]
    assert results[0].stdout.replace(b"bad.txt", b"again.txt") == results[1].stdout and not log.exists()
    assert (tmp_path / "bad.txt").read_bytes() == (tmp_path / "again.txt").read_bytes()


def test_other_commands_take_the_same_options(photos: Path, tmp_path: Path) -> None:
    """As training commands will use them."""
    (tmp_path / "list.txt").write_text("cat/a.jpg 1\ndog/b.jpg 0\n")
    command, found = typer.Typer(), []

    @command.command()
    @with_options(source=SourceOptions)
    def train(source) -> None:
        found.append(source.open(typer.echo, image_size=32))

    arguments = ["--data", str(tmp_path / "list.txt"), "--root", str(photos)]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.output == "list.txt: 2 pictures in 2 classes\n" and found[0].labels.tolist() == [1, 0]
    assert CliRunner().invoke(command, []).exit_code == 2
