"""ccache, where it is there, for tests that compile the same sources in several places."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

SETTINGS: dict[str, str] = {}
"""Environment variables for CMake: objects of the same text are compiled once, wherever below the temporary folder."""
if shutil.which("ccache"):
    SETTINGS = {
        "CMAKE_CXX_COMPILER_LAUNCHER": "ccache",
        "CCACHE_DIR": str(Path(__file__).resolve().parents[1] / "build" / "ccache"),
        "CCACHE_BASEDIR": tempfile.gettempdir(),
        "CCACHE_NOHASHDIR": "1",
    }
