"""The command line, `alitok-fast`: parses, calls, prints."""

from alitok_fast.cli.app import main

__all__ = ["main"]
