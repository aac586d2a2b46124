"""What a build decides: which torch, which tools, CUDA or not, whether its folder can be used again."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"tested_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delenv("ALITOK_TORCH", raising=False)
    monkeypatch.delenv("UV", raising=False)
    return load("build_backend")


def fake_torch(folder: Path, version: str) -> Path:
    (folder / "torch" / "include").mkdir(parents=True)
    metadata = folder / f"torch-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder / "torch"


def test_takes_the_torch_that_is_there(backend, monkeypatch, tmp_path: Path):
    torch = fake_torch(tmp_path / "new", "2.10.1+cu130")
    monkeypatch.setenv("ALITOK_TORCH", str(torch))
    assert backend.find_torch() == (torch, "2.10.1+cu130")
    assert not [name for name in backend.requirements() if name.startswith("torch")]


def test_asks_for_torch_where_there_is_none_or_an_old_one(backend, monkeypatch, tmp_path: Path):
    for torch in (tmp_path / "nothing" / "torch", fake_torch(tmp_path / "old", "2.9.1")):
        monkeypatch.setenv("ALITOK_TORCH", str(torch))
        assert backend.find_torch() is None
        assert "torch>=2.10" in backend.requirements()


def test_finds_the_torch_of_an_activated_environment(backend, monkeypatch, tmp_path: Path):
    """uv isolates a build in another interpreter; all it leaves of an activated environment is PATH."""
    torch = fake_torch(tmp_path / "lib" / "python3.11" / "site-packages", "2.13.0")
    (tmp_path / "pyvenv.cfg").touch()
    monkeypatch.setattr(backend.sysconfig, "get_paths", lambda: {"purelib": "", "platlib": ""})
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: "")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert backend.find_torch() == (torch, "2.13.0")


def test_uv_that_hides_the_environment_is_told_what_to_add(backend, monkeypatch):
    monkeypatch.setenv("UV", "/somewhere/uv")
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    monkeypatch.setattr(backend, "visible_environments", list)
    with pytest.raises(SystemExit, match="ALITOK_TORCH=.* uv pip install"):
        backend.requirements()


def test_asks_for_missing_tools(backend, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(backend, "find_torch", lambda: backend.Torch(tmp_path, "2.13.0"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backend.requirements() == ["cmake>=3.22", "ninja"]
    (tmp_path / "cmake").write_text("#!/bin/sh\necho cmake version 3.18.4\n")
    (tmp_path / "ninja").write_text("#!/bin/sh\necho 1.11.1\n")
    for tool in ("cmake", "ninja"):
        (tmp_path / tool).chmod(0o755)
    assert backend.requirements() == ["cmake>=3.22"]


def configure(torch: Path, build: Path, cuda: str = "AUTO") -> subprocess.CompletedProcess:
    options = (f"-DALITOK_TORCH={torch}", f"-DPython_EXECUTABLE={sys.executable}", f"-DALITOK_CUDA={cuda}")
    command = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options]
    return subprocess.run(command, capture_output=True, text=True)


def skip_without(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")


@pytest.fixture
def torch_for(tmp_path: Path):
    """torch_for(cuda, line) -> a torch package with what CMake reads of one: the headers' version, and its CUDA's."""
    torch = fake_torch(tmp_path, "2.11.0")
    for header in ("csrc/stable/library.h", "headeronly/version.h"):
        file = torch / "include" / "torch" / header
        file.parent.mkdir(parents=True)
        file.write_text('#define TORCH_VERSION "2.11.0"\n')

    def make(cuda: str | None, line: str = "cuda: Optional[str] = {}") -> Path:
        (torch / "version.py").write_text(f"__version__ = '2.11.0'\n{line.format(repr(cuda))}\nhip = None\n")
        return torch

    return make


def decision(done: subprocess.CompletedProcess) -> str:
    """The line in which CMake says what it builds and why."""
    assert done.returncode == 0, done.stderr
    (line,) = re.findall(r"-- alitok_fast: (.*)", done.stdout)
    return line


@pytest.mark.parametrize("line", ["cuda: Optional[str] = {}", "cuda = {}"])
def test_an_nvcc_newer_than_torch_is_refused(tmp_path: Path, torch_for, line: str):
    """Such kernels do not start where the driver is just new enough for torch; older ones do, with any torch."""
    skip_without("nvcc", "cmake", "ninja")
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    major = int(re.search(r"release (\d+)\.", nvcc).group(1))

    def with_torch_for(version: str | None, cuda: str = "AUTO") -> subprocess.CompletedProcess:
        return configure(torch_for(version, line), tmp_path / "build", cuda)

    for version in (f"{major}.0", f"{major + 1}.2"):
        assert re.search(
            rf"CUDA {major}\..* kernels .*torch is built for CUDA {version}", decision(with_torch_for(version))
        )
    done = with_torch_for(f"{major - 1}.8")
    message = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert re.search(f"nvcc: expected CUDA {major - 1} or older, since torch .* CUDA {major - 1}.8, got CUDA", message)
    assert f"CUDA_HOME to a toolkit of CUDA {major - 1}, or ALITOK_CUDA=0" in message
    assert with_torch_for(f"{major - 1}.8", cuda="OFF").returncode == 0


def test_cuda_kernels_are_for_a_torch_that_has_cuda(tmp_path: Path, torch_for, monkeypatch):
    """Minutes of nvcc for kernels that nothing would start: only where they are asked for."""
    skip_without("cmake", "ninja")
    line = decision(configure(torch_for(None), tmp_path / "build"))
    assert re.fullmatch(r"CPU kernels \(scalar.*\) only: torch 2.11.0 here has no CUDA; ALITOK_CUDA=1 .*", line)
    line = decision(configure(torch_for("13.0"), tmp_path / "off", "OFF"))
    assert line.endswith("only: CUDA kernels are off as asked, ALITOK_CUDA=0")
    if shutil.which("nvcc"):
        line = decision(configure(torch_for(None), tmp_path / "build", "ON"))
        assert re.search(
            r"and CUDA \S+ kernels \(.*\): asked for by ALITOK_CUDA=1; torch 2.11.0 here has no CUDA", line
        )


@pytest.fixture
def setup(backend):
    return load("setup")


def built_folder(setup, folder: Path) -> Path:
    setup.start_anew_where_stale(folder)
    (folder / "CMakeCache.txt").touch()
    (folder / "an_object.o").touch()
    return folder


def test_a_build_folder_is_used_again(setup, tmp_path: Path):
    folder = built_folder(setup, tmp_path / "build")
    setup.start_anew_where_stale(folder)
    assert (folder / "an_object.o").exists()


def test_a_moved_or_copied_build_folder_is_started_anew(setup, tmp_path: Path, capsys):
    moved = built_folder(setup, tmp_path / "build").rename(tmp_path / "moved")
    setup.start_anew_where_stale(moved)
    assert not (moved / "an_object.o").exists() and not (moved / "CMakeCache.txt").exists()
    assert capsys.readouterr().out == "alitok_fast: moved: started anew, because folder changed\n"


@pytest.mark.parametrize("name", ["CXXFLAGS", "CUDA_HOME", "CMAKE_ARGS"])
def test_what_cmake_would_keep_starts_a_build_folder_anew(setup, tmp_path: Path, monkeypatch, name: str):
    """Else CUDA_HOME, which an error advises to set, would change nothing: the cache holds the first nvcc."""
    monkeypatch.delenv(name, raising=False)
    folder = built_folder(setup, tmp_path / "build")
    monkeypatch.setenv(name, "/elsewhere")
    setup.start_anew_where_stale(folder)
    assert not (folder / "an_object.o").exists()


def test_a_build_folder_of_unknown_origin_is_started_anew(setup, tmp_path: Path):
    folder = built_folder(setup, tmp_path / "build")
    (folder / "surroundings.json").unlink()
    setup.start_anew_where_stale(folder)
    assert not (folder / "an_object.o").exists()


@pytest.mark.slow
def test_a_moved_checkout_builds_again(tmp_path: Path):
    """As far as CMake has configured, which is where a cache of another place stops it."""
    skip_without("cmake", "ninja")
    ignored = shutil.ignore_patterns(".git", "build", "*.so", ".venv", "weights", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "old", ignore=ignored)
    (tmp_path / "bin").mkdir()
    cmake = tmp_path / "bin" / "cmake"
    cmake.write_text(f'#!/bin/sh\n[ "$1" = --build ] && exit 3\nexec {shutil.which("cmake")} "$@"\n')
    cmake.chmod(0o755)
    settings = os.environ | {"PATH": f"{cmake.parent}{os.pathsep}{os.environ['PATH']}", "ALITOK_CUDA": "0"}

    def build(folder: Path) -> str:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert "Configuring done" in build(tmp_path / "old")
    out = build((tmp_path / "old").rename(tmp_path / "new"))
    assert "started anew" in out and "Configuring done" in out and "CMake Error" not in out


def test_jobs_and_cuda_switch(setup, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= setup.jobs() <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.jobs() == 3
    for value, mode in (("", "AUTO"), ("0", "OFF"), ("1", "ON")):
        monkeypatch.setenv("ALITOK_CUDA", value)
        assert setup.cuda_mode() == mode
    monkeypatch.setenv("ALITOK_CUDA", "yes")
    with pytest.raises(SystemExit, match="ALITOK_CUDA: expected 0 or 1, got 'yes'"):
        setup.cuda_mode()
