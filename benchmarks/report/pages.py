"""Sections as one Markdown page and one HTML page that needs nothing else."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from alitok_fast.storage.files import write_atomically
from report import plots
from report.collect import Report, collect
from report.sections import Section, Table, sections

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 1080px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #d5dae1; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.8rem 0.25rem 0; border-bottom: 1px solid #e6e9ee; }
th { border-bottom: 2px solid #aeb6c2; } code { font-size: 0.9em; background: #f2f4f7; padding: 0 0.2em; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { color: #4a5564; font-size: 0.9rem; max-width: 60rem; }
"""


def write_report(data: dict[str, Any], folder: Path) -> Path:
    """report.json, report.md and report.html in `folder`, each whole or not at all. Returns the Markdown page."""
    report = collect(data)
    pages = {JSON: json.dumps(data, indent=1) + "\n", MARKDOWN: markdown(report), HTML: page(report)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        write_atomically(folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    return folder / MARKDOWN


def markdown(report: Report) -> str:
    lines = [f"# Speed of alitok_fast on {report.title}", ""]
    for section in sections(report):
        lines += [f"## {section.title}", ""]
        for paragraph in section.text:
            lines += [paragraph, ""]
        for table in section.tables:
            lines += [markdown_table(table), ""]
    return "\n".join(lines)


def markdown_table(table: Table) -> str:
    rows = [table.header, ("---",) * len(table.header), *table.rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    )


def page(report: Report) -> str:
    title = html.escape(f"Speed of alitok_fast on {report.title}")
    body = "\n".join(_section(section, report) for section in sections(report))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _section(section: Section, report: Report) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{_inline(paragraph)}</p>" for paragraph in section.text]
    parts += [_table(table) for table in section.tables]
    parts += [_figure(name, report) for name in section.figures]
    return "\n".join(parts)


def _table(table: Table) -> str:
    header = "".join(f"<th>{_inline(cell)}</th>" for cell in table.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _figure(name: str, report: Report) -> str:
    figure = plots.FIGURES[name](report)
    if figure is None:
        return ""
    svg, caption = figure
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _inline(text: str) -> str:
    """Markdown's bold and code, the only marks that sections use."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
