"""The binary: what it may need of torch and of the machine, and what happens without it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alitok_fast import _library, info

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
        runtime = re.search(r"@@?(GLIBC|GLIBCXX|CXXABI|GCC)_", symbol)
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
def test_is_stripped():
    """No names that only a debugger needs; the file in build/ has them."""
    assert ".symtab" not in run("readelf", "--sections", "--wide", EXTENSION.origin)


def unstripped() -> Path:
    """The extension with its functions' names: the file in build/ that the installed one was made of."""
    for file in (ROOT / "build").glob(f"*/{Path(EXTENSION.origin).name}"):
        if code_of(file) == code_of(Path(EXTENSION.origin)):
            return file
    pytest.skip("the extension was not built in this checkout, and is stripped")


def code_of(file: Path) -> str:
    """A fingerprint of the machine code."""
    return hashlib.sha256(
        run("objdump", "--full-contents", "--section=.text", file).partition("\n\n")[2].encode()
    ).hexdigest()


@native
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="instruction sets of x86-64")
def test_wide_instructions_stay_in_their_namespaces():
    """A machine without AVX runs everything outside alitok::avx2 and alitok::avx512, static initialisers included."""
    vector = re.compile(r"%[xyz]mm\d|%tmm\d")
    function, strays, seen = "", set(), set()
    for line in run("objdump", "-d", "-C", "--no-show-raw-insn", unstripped()).splitlines():
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
def test_unknown_instruction_set_is_refused():
    code = (
        "import torch\nfrom alitok_fast import _C, info\n"
        "for _ in range(2):\n"  # the second call is not better off
        "    try: _C.cpu_isa()\n"
        "    except RuntimeError as error: print(error)\n"
        "print(info.info()['cpu']['off'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ALITOK_CPU_ISA": "sse9"}, capture_output=True, text=True
    )
    assert run.stdout.count("ALITOK_CPU_ISA: expected scalar, avx2, avx512 or amx, got sse9") == 3, run.stderr


@native
def test_the_instruction_set_is_read_once(monkeypatch):
    """A read in each call races with whoever changes the environment meanwhile, which ends in a crash."""
    from alitok_fast import _C

    before = _C.cpu_isa()
    monkeypatch.setenv("ALITOK_CPU_ISA", "sse9")
    assert _C.cpu_isa() == before


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
    assert f"{sys.executable} -m pip install --no-deps --force-reinstall ." in out
    assert "extension   not loaded" in out and "off         alitok_fast: its native extension" in out


def copied_package(target: Path, extension: bool) -> Path:
    left_out = ["weights", "__pycache__", *([] if extension else ["_C*"])]
    shutil.copytree(ROOT / "alitok_fast", target / "alitok_fast", ignore=shutil.ignore_patterns(*left_out))
    return target / "alitok_fast"


def complaint(cwd: Path, *path: Path) -> str:
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return run(sys.executable, "-c", USE_OPERATOR, cwd=cwd, env=settings)


@native
def test_a_checkout_that_hides_the_installed_package_is_named(tmp_path: Path):
    """Started in an unbuilt checkout, Python finds that first; to install once more would change nothing."""
    installed = copied_package(tmp_path / "site-packages", extension=True)
    checkout = copied_package(tmp_path / "checkout", extension=False).parent
    (checkout / "pyproject.toml").touch()
    out = complaint(checkout, installed.parent)
    assert f"The source checkout {checkout} hides the installed package in {installed}" in out
    assert (
        f"Start Python in another folder, or build this checkout in place with: {sys.executable} -m pip install" in out
    )
    assert f"--editable {checkout}" in out and "--force-reinstall" not in out


@native
def test_an_unbuilt_checkout_is_built_in_place(tmp_path: Path):
    checkout = copied_package(tmp_path / "checkout", extension=False).parent
    (checkout / "pyproject.toml").touch()
    out = complaint(checkout)
    assert f"Build it in this checkout with: {sys.executable} -m pip install --no-deps --editable {checkout}" in out
    assert "hides" not in out


@native
def test_an_extension_for_another_python_is_named(tmp_path: Path):
    package = copied_package(tmp_path, extension=False)
    (package / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert re.search(
        r"expected _C\.\S+, for this Python, in .*, got _C\.cpython-39\S+, for another", complaint(tmp_path)
    )


@pytest.mark.parametrize(
    ("checkout", "origin", "hint"),
    [
        ("/src", None, "pip install --editable '/src[train]'"),
        (".", None, "pip install --editable '.[train]'"),
        (None, None, "pip install 'alitok_fast[train]'"),
        (None, {"url": "https://x.org/a.whl", "archive_info": {}}, "pip install 'alitok_fast[train]'"),
        (None, {"url": "file:///a%20b/src", "dir_info": {}}, "pip install '/a b/src[train]'"),
        (
            None,
            {"url": "https://x.org/a.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "pip install 'alitok_fast[train] @ git+https://x.org/a.git'",
        ),
    ],
)
def test_extras_are_asked_for_where_the_package_came_from(monkeypatch, tmp_path, checkout, origin, hint):
    metadata = tmp_path / "alitok_fast-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: alitok_fast\nVersion: 0\n")
    if origin:
        (metadata / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_library, "CHECKOUT", checkout and (tmp_path if checkout == "." else Path(checkout)))
    assert _library.install_hint("train") == hint


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
