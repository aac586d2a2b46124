"""docs/configuration.md names every setting with its default; the pages name files, commands and targets that exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from alitok_fast.cli.options import LoadOptions
from alitok_fast.config import GeneratorConfig, TokenizerConfig
from alitok_fast.inference.params import SamplingParams
from alitok_fast.serving.replicas import ReplicaSettings
from alitok_fast.serving.settings import ServeSettings
from alitok_fast.training.config import GeneratorTrainConfig, TokenizerTrainConfig
from alitok_fast.training.phases import Phase
from alitok_fast.training.run_settings import PARTS, settings_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINING = (TokenizerTrainConfig, GeneratorTrainConfig)


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", CONFIGURATION, re.MULTILINE | re.DOTALL).group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables in `text`, headings left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rulers = [i for i, line in enumerate(lines) if line.startswith("|---")]
    bodies = [line for i, line in enumerate(lines) if i not in rulers and i + 1 not in rulers]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in bodies]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def table(text: str, column: int = 1) -> dict[str, str]:
    """Names of the first column, each with its value of another one; a row may hold several of both."""
    found: dict[str, str] = {}
    for cells in rows(text):
        names, values = quoted(cells[0]), quoted(cells[column])
        found.update(zip(names, values or [""] * len(names), strict=True))
    return found


def defaults(settings: type) -> dict[str, str]:
    return {
        field.name: ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        for field in dataclasses.fields(settings)
    }


@pytest.mark.parametrize(
    "settings", [SamplingParams, LoadOptions, ServeSettings, ReplicaSettings], ids=lambda kind: kind.__name__
)
def test_options_are_those_of_the_dataclass(settings):
    assert table(section(settings.__name__)) == defaults(settings)


@pytest.mark.parametrize("column, settings", list(enumerate(TRAINING, start=1)))
def test_training_settings_are_those_of_the_dataclass(column, settings):
    shown = table(section("Training"), column)
    said = {name: value for name, value in defaults(settings).items() if value}
    assert {name: value for name, value in shown.items() if value} == said
    assert set(shown) == {field.name for one in TRAINING for field in dataclasses.fields(one)}


def test_fields_of_a_phase_are_those_of_the_dataclass():
    expected = {f.name: "" if f.default is dataclasses.MISSING else str(f.default) for f in dataclasses.fields(Phase)}
    assert table(section("Phases")) == expected


def test_sizes_of_models_are_those_of_the_dataclasses():
    tokenizer, generator = section("Models").split("`GeneratorConfig` describes")
    assert table(tokenizer) == defaults(TokenizerConfig)
    assert table(generator) == defaults(GeneratorConfig)


@pytest.mark.parametrize("column, kind", list(enumerate(PARTS, start=2)))
def test_settings_of_run_files_are_those_there_are(column, kind):
    settings = {path: s for path, s in settings_of(kind).items() if s.part in ("start", "data", "watch")}
    shown = {cells[0].strip("`"): cells for cells in rows(section("Run files")) if "." in cells[0]}
    assert {path: cells[column].strip("`") for path, cells in shown.items() if cells[column]} == {
        path: str(setting.default) for path, setting in settings.items()
    }
    for path, setting in settings.items():
        (option,) = [f for f in dataclasses.fields(PARTS[kind][setting.part]) if f.name == setting.name]
        (name,) = option.metadata["names"] or [f"--{setting.name.replace('_', '-')}"]
        assert quoted(shown[path][1]) == [name]


def environment_variables(*places: str) -> set[str]:
    """Names that files in these places read."""
    patterns = (
        r"""(?:environ\.get\(|environ\[|getenv\()["']([A-Z_]+)["']""",
        r"""["']([A-Z_]+)["'] in os\.environ""",
        r"\bENV\{(\w+)\}",
    )
    files = [
        file for place in places for file in ([ROOT / place] if "." in place else sorted((ROOT / place).rglob("*")))
    ]
    texts = [file.read_text() for file in files if file.suffix in (".py", ".cpp", ".txt") and file.is_file()]
    return {name for pattern in patterns for text in texts for name in re.findall(pattern, text)}


def test_every_environment_variable_is_named():
    """Those that the build, the kernels and the package read; of the tests' and benchmarks', this project's own."""
    read = environment_variables("alitok_fast", "csrc", "setup.py", "build_backend.py", "CMakeLists.txt")
    own = {name for name in environment_variables("tests", "benchmarks") if name.startswith("ALITOK_")}
    named = set(table(section("Environment variables")))
    assert (
        {"ALITOK_CUDA", "ALITOK_CPU_ISA", "ALITOK_TRACEBACK", "ALITOK_GOLDEN"} <= read | own <= named | {"PATH", "UV"}
    )


def test_every_variable_of_make_is_named():
    variables = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(table(section("Variables of make"))) == set(variables)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    """Paths in backticks with a folder and a suffix, from the root, from the page's folder or from the package."""
    paths = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|cpp|cu|h|md|json|txt|html|png))`", page.read_text())
    places = (ROOT, page.parent, ROOT / "alitok_fast")
    assert [path for path in paths if not any((place / path).exists() for place in places)] == []


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        to = (page.parent / file).resolve() if file else page
        assert to.exists(), target
        assert to.is_relative_to(ROOT), target
        assert not anchor or anchor in headings(to), target


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w.-]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
