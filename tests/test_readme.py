"""What the README shows, runs: its Python block on the shipped weights, its commands and its files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from alitok_fast.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, "" for those that name none."""
    parts = re.split(r"^```(.*)\n", README, flags=re.MULTILINE)  # text, opening, block, closing, text, opening, ...
    return [block for opening, block in zip(parts[1::4], parts[2::4], strict=True) if opening == language]


def test_the_first_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    assert (tmp_path / "bag.png").stat().st_size > 0
    assert names["out"].metadata["labels"] == [8, 9, 3]
    assert names["images"].shape == (2, 3, 32, 32)
    assert names["logits"].shape[:2] == (2, names["tokens"].shape[1] + 1)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_it_opens_with_a_picture_then_the_two_commands():
    picture, demo, test = README.index("!["), README.index("make demo"), README.index("make test")
    assert picture < demo < test < README.index("```python")


@pytest.mark.parametrize("line", [line for line in "".join(blocks("")).splitlines() if line.startswith("alitok-fast")])
def test_commands_exist_with_their_options(line):
    command = get_command(app)
    words = shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known
