"""What README.md and the pages of docs/ show, runs: Python on the shipped weights, commands with their options."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from alitok_fast.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, "" for those that name none."""
    parts = re.split(r"^```(.*)\n", text, flags=re.MULTILINE)  # text, opening, block, closing, text, opening, ...
    return [block for opening, block in zip(parts[1::4], parts[2::4], strict=True) if opening == language]


def command_lines(page: Path) -> list[str]:
    """Lines of code, in a fence or indented, that call a program; continued lines joined."""
    text = page.read_text()
    code = "".join(blocks(text, "")) + "".join(re.findall(r"^    .*\n", text, re.MULTILINE))
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    return [line.strip() for line in lines if re.match(r"\s*(alitok-fast|torchrun|python|pytest) ", line)]


COMMANDS = [(page.name, line) for page in PAGES for line in command_lines(page)]
EXAMPLES = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page.read_text(), "python"))
    if not block.startswith(">>>")  # those are doctests, with a test of their own
    and "http://localhost" not in block  # those want a server: tests/serving
]


def test_it_is_short():
    assert len(README.splitlines()) < 120


def test_it_opens_with_a_picture_then_the_two_commands():
    picture, demo, test = README.index("!["), README.index("make demo"), README.index("make test")
    assert picture < demo < test < README.index("```python")


def test_the_first_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    code = blocks(README, "python")[0]
    assert 8 <= len([line for line in code.splitlines() if line]) <= 12
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "bag.png").stat().st_size > 0
    assert names["samples"].metadata["labels"] == [8, 9, 3]
    assert names["images"].shape == (2, 3, 32, 32)
    assert names["logits"].shape[:2] == (2, names["tokens"].shape[1] + 1)


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {})


def test_there_are_commands():
    assert {name for name, _ in COMMANDS} >= {"README.md", "demo.md", "sampling.md", "training.md"}


@pytest.mark.parametrize("line", [pytest.param(line, id=f"{page}: {line[:60]}") for page, line in COMMANDS])
def test_commands_exist_with_their_options(line):
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
        assert words[0] == "alitok_fast.cli"
    elif words[0] == "python" and words[1] == "-m":
        assert words[2] == "pytest" or importlib.util.find_spec(words[2]) is not None
        return
    elif words[0] == "python":
        assert (ROOT / words[1]).exists()
        return
    elif words[0] == "pytest":
        own = re.findall(r"addoption\(\s*\"(--[\w-]+)", (ROOT / "benchmarks" / "conftest.py").read_text())
        assert (ROOT / words[1]).exists()
        assert {word for word in words if word.startswith("--")} <= {"--benchmark", *own}
        return
    command = get_command(app)
    words = words[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known
