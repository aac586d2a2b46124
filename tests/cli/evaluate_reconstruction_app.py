"""`evaluate reconstruction` as a program of its own, for torchrun: evaluate_reconstruction_app.py OPTIONS."""

from __future__ import annotations

import typer

from alitok_fast.cli.evaluate_reconstruction import reconstruction

if __name__ == "__main__":
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command()(reconstruction)
    app()
