"""PEP 517 backend: setuptools, plus the torch and the tools that are already installed.

A build runs in an environment of its own, where torch would be downloaded again: gigabytes, and maybe another release
than the one in use. The extension is written on torch's stable ABI and needs only headers and one library to link with,
so this backend finds the torch of the environment that is being installed into, and asks for torch, cmake or ninja as
build requirements only where there is none.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

OLDEST_TORCH = (2, 10)
OLDEST_CMAKE = (3, 22)
UV_CANNOT_SEE = """\
alitok_fast: uv builds in an environment of its own and does not say which one it installs into, so the torch there
cannot be found. Do one of these:
    source <environment>/bin/activate    and run the same command again
    ALITOK_TORCH=<environment>/lib/python3.X/site-packages/torch uv pip install .
    uv pip install --no-build-isolation .    with setuptools, cmake and ninja installed"""


class Torch(NamedTuple):
    folder: Path
    """The torch package."""
    version: str


def search_path() -> list[str]:
    """Folders of packages in which to look for torch, best first.

    ALITOK_TORCH (the folder of a torch package) decides alone. Otherwise: this interpreter's own folders, which
    `sysconfig` names even under pip's build isolation, where they are missing from sys.path; sys.path, where a torch
    installed as a build requirement is; then, for uv, which isolates builds in another interpreter, the environments
    whose `bin` is on PATH and .venv beside this file.
    """
    if torch := os.environ.get("ALITOK_TORCH"):
        return [str(Path(torch).parent)]
    own = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], site.getusersitepackages()]
    others = [folder for env in visible_environments() for folder in sorted(env.glob("lib/python3*/site-packages"))]
    return [folder for folder in dict.fromkeys(own + sys.path + list(map(str, others))) if folder]


def visible_environments() -> list[Path]:
    """Virtual environments whose `bin` is on PATH, then .venv beside this file; not the one that runs this build."""
    folders = [Path(folder).parent for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders.append(Path(__file__).resolve().parent / ".venv")
    return [env for env in folders if (env / "pyvenv.cfg").is_file() and env != Path(sys.prefix)]


def find_torch() -> Torch | None:
    """The first torch >= 2.10 on `search_path`, without importing it."""
    for found in importlib.metadata.distributions(name="torch", path=search_path()):
        folder = Path(str(found.locate_file("torch")))
        if _numbers(found.version) >= OLDEST_TORCH and (folder / "include").is_dir():
            return Torch(folder, found.version)
    return None


def requirements() -> list[str]:
    """What a build needs beyond setuptools and is not here."""
    missing = []
    if find_torch() is None:
        if "UV" in os.environ and not visible_environments():
            raise SystemExit(UV_CANNOT_SEE)
        missing.append("torch>=" + ".".join(map(str, OLDEST_TORCH)))
    if _tool_version("cmake") < OLDEST_CMAKE:
        missing.append("cmake>=" + ".".join(map(str, OLDEST_CMAKE)))
    if not _tool_version("ninja"):
        missing.append("ninja")
    return missing


def _numbers(text: str) -> tuple[int, ...]:
    match = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else ()


def _tool_version(name: str) -> tuple[int, ...]:
    """Empty when the tool is missing, or fails: a script on PATH may belong to an environment that is hidden here."""
    try:
        return _numbers(subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return ()


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + requirements()
