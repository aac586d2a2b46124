"""Runs tests with the oldest releases that pyproject.toml allows: each `>=` of it is a promise.

    python tests/lowest.py            in build/lowest, which is kept
    python tests/lowest.py -x tests/test_cli.py      with other arguments for pytest

torch is the one of this environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "lowest"
EXTRAS = ["data", "parquet", "serve"]
TESTS = ["cli", "data", "storage", "pipelines", "serving/test_http.py", "test_progress.py"]


def bounds() -> dict[str, str | None]:
    """The lowest release of each requirement, by name; None for those of an extra that name none.

    Raises ValueError for a requirement of the package itself that names none.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [requirement for extra in EXTRAS for requirement in project["optional-dependencies"][extra]]
    found: dict[str, str | None] = {}
    for requirement in project["dependencies"] + optional:
        match = re.fullmatch(r"([\w-]+)(?: *>= *([\d.]+))?", requirement)
        if match is None or (match[2] is None and requirement not in optional):
            raise ValueError(f"pyproject.toml: expected NAME>=RELEASE, got {requirement!r}")
        found[match[1]] = match[2]
    return found


def environment() -> Path:
    """The interpreter of an environment with the lowest releases, this one's torch and the test tools."""
    pins = [f"{name}=={release}" if release else name for name, release in bounds().items() if name != "torch"]
    wanted = "\n".join([sys.version, sys.prefix, *pins])
    python, stamp = FOLDER / "bin" / "python", FOLDER / "complete"
    if not stamp.is_file() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *pins, "pytest", "hypothesis"]
        subprocess.run(install, check=True)
        # Looked at after the environment's own packages: what is not pinned comes from here.
        (own,) = FOLDER.glob("lib/python*/site-packages")
        (own / "torch_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        stamp.write_text(wanted)
    return python


def main(arguments: list[str]) -> int:
    python = environment()
    settings = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {list(bounds())}), sep=', ')"
    subprocess.run([str(python), "-c", shown], check=True, env=settings)
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *(arguments or tests)]
    return subprocess.run(command, cwd=ROOT, env=settings).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
