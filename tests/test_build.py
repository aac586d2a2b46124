"""The binary: what it may need of torch and of the machine, what happens without it; and the build's own choices."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alitok_fast import info

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = importlib.util.find_spec("alitok_fast._C")

native = pytest.mark.skipif(EXTENSION is None, reason="the extension is not built")


def run(*command: str | Path, **options) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} on this machine")
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


# ---- the binary ----


@native
def test_needs_only_the_stable_c_symbols_of_torch():
    """What makes one binary survive torch upgrades: no C++ symbol of libtorch."""
    foreign = []
    for line in run("nm", "--dynamic", "--undefined-only", EXTENSION.origin).splitlines():
        kind, symbol = line.split()[-2:]
        runtime = re.search(r"?(GLIBC|GLIBCXX|CXXABI|GCC)_", symbol)
        if kind != "w" and not runtime and not re.match(r"(aoti_torch_|torch_|_?Py)", symbol):
            foreign.append(symbol)
    assert foreign == []


@native
def test_loads_without_cuda_and_from_anywhere():
    dynamic = run("readelf", "--dynamic", "--wide", EXTENSION.origin)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.match(r"lib(cuda|torch_cuda|c10|torch_python|nv)", name)]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@native
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="instruction sets of x86-64")
def test_wide_instructions_stay_in_their_namespaces():
    """A machine without AVX runs everything outside alitok::avx2 and alitok::avx512, static initialisers included."""
    vector = re.compile(r"%[xyz]mm\d|%tmm\d")
    function, strays, seen = "", set(), set()
    for line in run("objdump", "-d", "-C", "--no-show-raw-insn", EXTENSION.origin).splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
            continue
        instruction = line.rpartition("\t")[2]
        if not vector.search(instruction) or not instruction.startswith(("v", "tile", "td")):
            continue
        isa = "avx512" if "alitok::avx512::" in function else "avx2" if "alitok::avx2::" in function else ""
        seen.add(isa)
        if not isa or (isa == "avx2" and re.search(r"%zmm|%tmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]", instruction)):
            strays.add(function)
    assert strays == set()
    assert seen == {"avx2", "avx512"}  # otherwise the search itself is broken


@native
def test_instruction_set_can_be_lowered(cpu_isa: str):
    from alitok_fast import _C

    assert _C.cpu_isa() == ("avx512" if cpu_isa == "amx" else cpu_isa)
    assert _C.cpu_has_amx() == (cpu_isa == "amx")


@native
def test_unknown_instruction_set_is_refused(monkeypatch):
    from alitok_fast import _C

    monkeypatch.setenv("ALITOK_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="ALITOK_CPU_ISA: expected scalar, avx2, avx512 or amx, got sse9"):
        _C.cpu_isa()
    assert any("sse9" in reason for reason in info.info()["cpu"]["off"])


# ---- a missing or broken extension ----

USE_OPERATOR = """
import sys
# An editable installation would lend the copy its extension.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import torch, alitok_fast
from alitok_fast.ops.vq_lookup import vq_lookup
z, codebook = torch.zeros(3, 8), torch.ones(4, 8)
with alitok_fast.use_reference():
    print("reference", vq_lookup(z, codebook).indices.tolist())
try:
    vq_lookup(z, codebook)
except ImportError as error:
    print(error)
from alitok_fast.info import report
print(report())
"""


@native
@pytest.mark.parametrize("damage", ["missing", "cut short", "foreign"])
def test_bad_extension_says_how_to_mend_it(tmp_path: Path, damage: str):
    package = tmp_path / "alitok_fast"
    shutil.copytree(ROOT / "alitok_fast", package, ignore=shutil.ignore_patterns("_C*", "weights", "__pycache__"))
    library = package / Path(EXTENSION.origin).name
    if damage == "cut short":
        whole = Path(EXTENSION.origin).read_bytes()
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "foreign":
        library.write_bytes(b"not a library" * 100)
    out = run(sys.executable, "-c", USE_OPERATOR, cwd=tmp_path)
    assert "reference [0, 0, 0]" in out
    assert f"native extension is {'missing' if damage == 'missing' else 'broken'}" in out
    assert damage != "cut short" or "cut short" in out
    assert f"{sys.executable} -m pip install --force-reinstall --no-deps ." in out
    assert "extension   not loaded" in out and "off         alitok_fast: its native extension" in out


# ---- info ----


def test_info_is_plain_and_complete():
    values = info.info()
    assert json.loads(json.dumps(values)) == values
    text = info.render(values)
    for part in (values["alitok_fast"], values["torch"], values["python"], values["cpu"]["model"]):
        assert part in text
    for part in ("extension", "cpu", "cuda"):
        assert all(reason in text for reason in values[part]["off"])


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80-real,90-real,90-virtual", "80", True),
        ("80-real,90-real,90-virtual", "86", True),
        ("80-real,90-real,90-virtual", "90", True),
        ("80-real,90-real,90-virtual", "100", True),  # PTX
        ("80-real,90-real,90-virtual", "75", False),
        ("80-real,90-real", "100", False),
        ("86-real", "80", False),
        ("80", "120", True),
        ("90a-real", "90", True),
        ("90a", "100", False),
        ("native", "75", True),
    ],
)
def test_which_gpus_a_build_serves(archs: str, capability: str, runs: bool):
    assert info.runs_on(archs, capability) is runs


@pytest.mark.parametrize(
    ("toolkit", "torch_cuda", "driver", "message"),
    [
        ("13.0.48", "13.0", "13.0", None),
        ("12.8.61", "13.0", "13.0", None),  # drivers run what older toolkits built
        ("13.0.48", None, None, None),  # nothing that would start them
        ("13.0.48", "12.8", "13.1", "built with CUDA 13.0.48, torch for 12.8: .* toolkit of CUDA 12"),
        ("13.0.48", "12.8", None, "built with CUDA 13.0.48, torch for 12.8: .* toolkit of CUDA 12"),
        ("13.0.48", "13.0", "12.4", "the driver runs up to 12.4; update it, or .* toolkit of CUDA 12"),
        ("13.0.48", "12.8", "12.4", "the driver runs up to 12.4; update it, or .* toolkit of CUDA 12"),
    ],
)
def test_a_toolkit_that_is_too_new_is_off(monkeypatch, toolkit, torch_cuda, driver, message):
    monkeypatch.setattr(info.torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(info, "_driver_version", lambda: driver)
    values = info._cuda({"loaded": True, "cuda": toolkit, "cuda_archs": "90-real"})
    found = [reason for reason in values["off"] if "built with CUDA" in reason]
    assert len(found) == (message is not None) and (message is None or re.search(message, found[0]))


# ---- the build's choices ----


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


@pytest.mark.parametrize("line", ["cuda: Optional[str] = {}", "cuda = {}"])
def test_an_nvcc_newer_than_torch_is_refused(tmp_path: Path, line: str):
    """Such kernels do not start where the driver is just new enough for torch; older ones do, with any torch."""
    nvcc = re.search(r"release (\d+)\.", run("nvcc", "--version"))
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    major, torch = int(nvcc.group(1)), fake_torch(tmp_path, "2.11.0")
    for header in ("csrc/stable/library.h", "headeronly/version.h"):
        file = torch / "include" / "torch" / header
        file.parent.mkdir(parents=True)
        file.write_text('#define TORCH_VERSION "2.11.0"\n')

    def with_torch_for(version: str | None, cuda: str = "AUTO") -> subprocess.CompletedProcess:
        (torch / "version.py").write_text(f"__version__ = '2.11.0'\n{line.format(repr(version))}\nhip = None\n")
        return configure(torch, tmp_path / "build", cuda)

    for version in (None, f"{major}.0", f"{major + 1}.2"):
        done = with_torch_for(version)
        assert done.returncode == 0 and f"CUDA {major}." in done.stdout, done.stderr
    done = with_torch_for(f"{major - 1}.8")
    message = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert re.search(f"nvcc: expected CUDA {major - 1} or older, since torch .* CUDA {major - 1}.8, got CUDA", message)
    assert f"CUDA_HOME to a toolkit of CUDA {major - 1}, or ALITOK_CUDA=0" in message
    assert with_torch_for(f"{major - 1}.8", cuda="OFF").returncode == 0


def test_jobs_and_cuda_switch(backend, monkeypatch):
    setup = load("setup")
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
