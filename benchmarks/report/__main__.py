"""python benchmarks/report REPORT.json [--out FOLDER]     rebuild the pages of a report
python benchmarks/report --readme [--check]             fill the README's table from benchmarks/reports/"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
sys.path[:0] = [str(BENCHMARKS), str(ROOT)]

from report.pages import write_report  # noqa: E402
from report.readme import fill  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="?", type=Path, help="a report.json")
    parser.add_argument("--out", type=Path, help="folder of the pages; by default the JSON's own")
    parser.add_argument("--readme", nargs="?", type=Path, const=ROOT / "README.md", help="fill the table of this file")
    parser.add_argument("--reports", type=Path, default=BENCHMARKS / "reports", help="where the reports are")
    parser.add_argument("--check", action="store_true", help="with --readme: fail where the table is out of date")
    given = parser.parse_args()
    if (given.json is None) == (given.readme is None):
        parser.error("expected a report.json, or --readme")
    try:
        if given.json is not None:
            print(write_report(json.loads(given.json.read_text()), given.out or given.json.parent))
            return 0
        current = fill(given.readme.resolve(), given.reports.resolve(), given.check)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.check and not current:
        print(f"{given.readme.name}: its table is not that of {given.reports}; run without --check", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
