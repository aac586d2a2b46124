"""docs/operators.md: its examples run and give what it shows, and its ratios are those of the report."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "operators.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
REPORT = ROOT / "benchmarks" / "reports" / "amd-epyc-2-threads" / "report.json"
RATIO = re.compile(r"^\| `([^`]+)` \| (.+?) \| ([\d.]+)x \|$", re.MULTILINE)


def operators() -> list[str]:
    listed = re.search(r"set\(ALITOK_OPERATORS([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    return listed.group(1).split()


def examples(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_every_operator_has_its_section():
    assert sorted(set(SECTIONS) - {"What holds for all of them"}) == sorted(operators())


@pytest.mark.parametrize("operator", operators())
def test_a_section_says_what_a_caller_needs(operator):
    section = SECTIONS[operator]
    for row in ("shapes", "dtypes", "devices", "gradients", "errors"):
        assert re.search(rf"^\| {row} \| .+ \|$", section, re.MULTILINE), row
    assert bool(RATIO.findall(section)) != ("Not measured yet." in section)
    function = {"fused_linear": "norm_linear"}.get(operator, operator)
    assert any(f"{function}(" in example for example in examples(section))


@pytest.mark.parametrize("number", range(len(examples(PAGE))))
def test_examples(number):
    """Each stands for itself, and gives what is shown."""
    test = doctest.DocTestParser().get_doctest(examples(PAGE)[number], {}, f"example {number}", "operators.md", 0)
    assert test.examples and any(example.want for example in test.examples)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_ONLY_FIRST_FAILURE)
    assert runner.run(test, out=output.append).failed == 0, "".join(output)


def test_ratios_are_those_of_the_report():
    report = json.loads(REPORT.read_text())
    measured = {b["name"].removeprefix("bench_"): b["extra_info"]["contenders"] for b in report["benchmarks"]
                if "contenders" in b["extra_info"]}  # fmt: skip
    shown = RATIO.findall(PAGE)
    assert shown
    for name, alternative, times in shown:
        assert times == f"{measured[name][alternative]['times']:.3g}", f"{name} beside {alternative}"
    name = report["alitok_fast"]["machine"]["name"]
    assert f"on an {name} with {report['alitok_fast']['machine']['cpu']['cores']} cores" in PAGE.replace("\n", " ")


def test_operators_that_the_report_knows_are_shown_with_their_ratio():
    """Not "not measured yet" for what a later report has measured."""
    files = {b["fullname"].split("::")[0] for b in json.loads(REPORT.read_text())["benchmarks"]}
    for operator in operators():
        assert (f"benchmarks/bench_{operator}.py" in files) == bool(RATIO.findall(SECTIONS[operator])), operator
