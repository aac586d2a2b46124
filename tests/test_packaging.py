"""Whatever pip makes of the project works: sdist, a wheel from it, an editable installation, one from git."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import compiler_cache
import pytest
from lowest import bounds

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "ALITOK_CUDA": "0",
    "ALITOK_TORCH": str(Path(importlib.util.find_spec("torch").origin).parent),  # not in the environment installed into
    "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0",  # compiles in a quarter of the time
    **compiler_cache.SETTINGS,
}
COMPUTE = """
import alitok_fast, torch
from alitok_fast import Pipeline, load_tokenizer
tokenizer = load_tokenizer("demo")
whole = tokenizer.encode(torch.zeros(1, 3, 32, 32)).shape == (1, tokenizer.config.num_tokens)
image = Pipeline.from_pretrained("demo")(["bag"], seed=0).images[0]
print(alitok_fast.__file__, whole, image.size)
"""

slow = pytest.mark.slow


def run(*command: object, **options) -> str:
    options.setdefault("env", {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | SETTINGS)
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what git would track here, committed in a repository of its own."""
    for tool in ("git", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    target = tmp_path_factory.mktemp("packaging") / "alitok"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT, env=os.environ)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    run("git", "init", "-q", cwd=target)
    run("git", "add", "-A", cwd=target)
    run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "all", cwd=target)
    return target


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The interpreter of a fresh environment that borrows the libraries of this one, but not alitok_fast."""
    run(sys.executable, "-m", "venv", tmp_path / "env")
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # its own .pth files are not read
    return tmp_path / "env" / "bin" / "python"


def install(python: Path, *what: object, cwd: Path) -> str:
    """Returns the file of the package that a script elsewhere imports, once it has computed with it."""
    run(python, "-m", "pip", "install", "--no-deps", "--ignore-installed", *what, cwd=cwd)
    file, result = run(python, "-c", COMPUTE, cwd=cwd).strip().split(" ", 1)
    assert result == "True (32, 32)"
    return file


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    code = "import sys; sys.path.insert(0, '.'); import build_backend; build_backend.build_sdist('dist')"
    run(sys.executable, "-c", code, cwd=checkout)
    (file,) = (checkout / "dist").glob("*.tar.gz")
    return file


@slow
def test_sdist_holds_what_a_build_needs(checkout: Path, sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "alitok_fast"):  # weights and py.typed are in the latter
        tracked = {str(file.relative_to(checkout)) for file in (checkout / folder).rglob("*") if file.is_file()}
        assert {name for name in tracked if "__pycache__" not in name and not name.endswith(".so")} <= names
    assert {"CMakeLists.txt", "build_backend.py", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/", "build/"))]


@slow
def test_wheel_from_the_sdist(sdist: Path, environment: Path, tmp_path: Path):
    run(environment, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheels", sdist, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"alitok_fast", wheel.name.partition("-cp")[0] + ".dist-info"}
    inside = {name.partition("/")[2] for name in names if name.startswith("alitok_fast/")}
    here = {file.relative_to(ROOT / "alitok_fast").as_posix() for file in (ROOT / "alitok_fast").rglob("*")}
    wanted = {name for name in here if name.endswith(".py") or name.startswith("weights/demo/") and "." in name}
    assert wanted | {"py.typed"} <= inside
    assert [name for name in inside if name.endswith(".so")] == [f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    assert str(tmp_path / "env") in install(environment, wheel, cwd=tmp_path)


@slow
def test_editable(checkout: Path, environment: Path, tmp_path: Path):
    assert install(environment, "--editable", checkout, cwd=tmp_path) == str(checkout / "alitok_fast" / "__init__.py")


@slow
def test_from_git(checkout: Path, environment: Path, tmp_path: Path):
    assert str(tmp_path / "env") in install(environment, f"git+file://{checkout}", cwd=tmp_path)


@slow
def test_lowest_requirements():
    """tests/lowest.py: commands, files, pictures and the server with the oldest releases that pyproject.toml allows."""
    run(sys.executable, ROOT / "tests" / "lowest.py", cwd=ROOT, env=os.environ)


def test_each_requirement_has_a_lowest_release():
    required = {"torch", "numpy", "safetensors", "pillow", "rich", "typer"}
    optional = {"webdataset", "datasets", "scipy", "pyarrow", "fastapi", "uvicorn", "prometheus_client"}
    assert required | optional == set(bounds())


def test_the_build_asks_for_the_torch_that_the_package_asks_for():
    text = (ROOT / "build_backend.py").read_text()
    oldest = re.search(r"OLDEST_TORCH = \((\d+), (\d+)\)", text)
    assert bounds()["torch"] == ".".join(oldest.groups())
