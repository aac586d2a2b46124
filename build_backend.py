"""PEP 517 backend: setuptools, plus the torch that is already installed.

A build runs in an environment of its own, where torch would be downloaded again: gigabytes, and maybe another release
than the one in use. The extension is written on torch's stable ABI and needs only headers and one library to link with,
so this backend finds the torch of the environment that pip installs into, and asks for torch as a build requirement
only where there is none.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

OLDEST_TORCH = (2, 10)


class Torch(NamedTuple):
    folder: Path
    """The torch package."""
    version: str


def search_path() -> list[str]:
    """Where to look for torch: ALITOK_TORCH, this interpreter's path, then the environment being installed into.

    Under build isolation pip removes that environment from sys.path, but `sysconfig` still names it. uv runs the build
    in a virtual environment of its own; it keeps VIRTUAL_ENV, which names the user's.
    """
    places = [os.environ.get("ALITOK_TORCH", ""), *sys.path]
    places += [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    if environment := os.environ.get("VIRTUAL_ENV"):
        places += [sysconfig.get_path(name, "venv", {"base": environment, "platbase": environment}) for name in ("purelib", "platlib")]
    return [place for place in dict.fromkeys(places) if place]


def find_torch() -> Torch | None:
    """The first torch >= 2.10 on `search_path`, without importing it."""
    for found in importlib.metadata.distributions(name="torch", path=search_path()):
        folder = Path(str(found.locate_file("torch")))
        numbers = tuple(int(part) for part in found.version.split("+")[0].split(".")[:2])
        if numbers >= OLDEST_TORCH and (folder / "include").is_dir():
            return Torch(folder, found.version)
    return None


def _torch_requirement() -> list[str]:
    return [] if find_torch() else ["torch>=" + ".".join(map(str, OLDEST_TORCH))]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
