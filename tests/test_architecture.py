"""The rules of CONTRIBUTING.md that a machine can hold: who may import and include whom, one stem per operator."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "alitok_fast"
CSRC = ROOT / "csrc"

# The rooms of the package (its sub-packages, and the modules that lie beside them), from the ground up. A file imports
# from its own room and from those below it; `testing` is for tests and benchmarks.
ROOMS = (
    ("config",),
    ("_library", "device", "progress"),
    ("storage",),
    ("data", "ops"),
    ("models",),
    ("inference",),
    ("evaluation",),
    ("pipelines", "training"),
    ("serving", "studies"),
    ("info",),
    ("cli",),
    ("testing",),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}

GLUE_HEADERS = (
    "checks.h",
    "overlap.h",
    "sample_settings.h",
    "cuda_stream.h",
    "packed_linear_glue.h",
    "torch_parallel.h",
)
TORCH_OR_PYTHON = re.compile(r"^(torch/|ATen/|c10/|pybind11/|Python\.h)")


CUDA_ONLY = {"fused_linear", "norm_head"}  # on a CPU a step is one native call (decode)


def python_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """The sub-package, or the module directly under alitok_fast, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: str = "alitok_fast") -> Iterator[str]:
    """Dotted names imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            if node.module == package:
                yield from (f"{package}.{alias.name}" for alias in node.names)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_imported(path: Path, known: set[str]) -> Iterator[str]:
    """The modules of `known` that a file imports; `from room import module` is of the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (part if part in known else node.module for part in parts if node.module in known)


def own_imports(path: Path) -> set[str]:
    names = imports(ast.parse(path.read_text()))
    units = {name.split(".")[1] for name in names if name.startswith("alitok_fast.")}
    return {name for name in units if name not in ("__version__", "_C")}


def operators() -> list[str]:
    listed = re.search(r"set\(ALITOK_OPERATORS([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    return listed.group(1).split()


# ---- Python ----


def test_the_rooms_are_those_of_the_package():
    """Found by walking: a new room needs its floor, a dead one goes."""
    assert {room(path) for path in python_files()} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_imports_go_downward(path: Path):
    own = room(path)
    if own == "__init__":
        assert own_imports(path) == set(), "the package loads its parts on first use"
        return
    for other in own_imports(path) - {own}:
        assert FLOOR[other] < FLOOR[own], f"{relative(path)} imports {other}"


def test_rooms_hold_no_circle():
    """Inside a room too, modules depend on each other in one direction."""
    names = set(map(module_name, python_files()))
    waiting = {module_name(path): set(modules_imported(path, names)) - {"alitok_fast"} for path in python_files()}
    while free := {name for name, needed in waiting.items() if not needed & waiting.keys()}:
        waiting = {name: needed for name, needed in waiting.items() if name not in free}
    assert waiting == {}


def test_one_definition_of_a_name():
    """Two functions or classes of one public name are two answers to one question (two `write_json`, two `psnr`)."""
    places: dict[str, list[str]] = {}
    for path in python_files():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(relative(path))
    commands = {name for name, found in places.items() if any("/cli/" in path for path in found)}
    assert {name: found for name, found in places.items() if len(found) > 1 and name not in commands} == {}


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_files_are_short_enough_to_read(path: Path):
    assert len(path.read_text().splitlines()) <= 310


def test_operators_never_see_a_config():
    assert [relative(path) for path in sorted((PACKAGE / "ops").glob("*.py")) if "config" in own_imports(path)] == []


def test_models_never_branch_on_device():
    for path in sorted((PACKAGE / "models").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{relative(path)}:{getattr(node, 'lineno', '')}"
            if isinstance(node, (ast.If, ast.IfExp, ast.While)):
                condition = ast.unparse(node.test)
                assert not re.search(r"is_cuda|is_cpu|device\.type|['\"]cuda|cuda\.is_available", condition), where


def test_lengths_come_from_the_config():
    """256 x 256 images of 16 x 16 patches give 17 prefix, 256 image and 273 tokens; no model knows that."""
    for path in python_files():
        if room(path) not in ("models", "ops", "inference", "pipelines"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and type(node.value) is int:
                assert node.value not in (17, 272, 273, 274, 305), f"{relative(path)}:{node.lineno}"


def test_weights_from_files_are_data():
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            where, call = f"{relative(path)}:{node.lineno}", ast.unparse(node.func)
            assert call not in ("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler"), where
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if call == "torch.load":
                assert keywords.get("weights_only") == "True", where
            if call in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle", "False") == "False", where


def test_tests_and_benchmarks_do_not_import_each_other():
    for folder, other in (("tests", "benchmarks"), ("benchmarks", "tests")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found = [name for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == other]
            assert found == [], relative(path)


# ---- C++ ----


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def reached(path: Path) -> set[str]:
    """Everything that a file includes, through our own headers too."""
    found: set[str] = set()
    waiting = includes(path)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            if (CSRC / name).is_file():
                waiting += includes(CSRC / name)
    return found


def kernel_files() -> list[Path]:
    headers = [path for path in CSRC.glob("*.h") if path.name not in GLUE_HEADERS]
    return sorted([*headers, *CSRC.glob("*_cpu.cpp"), *CSRC.glob("*.cu")])


@pytest.mark.parametrize("path", kernel_files(), ids=relative)
def test_kernels_know_neither_torch_nor_python(path: Path):
    found = reached(path)
    assert [name for name in sorted(found) if TORCH_OR_PYTHON.match(name) or name in GLUE_HEADERS] == []
    if not path.name.startswith("cuda_") and not path.name.endswith(("_cuda.cu", "_sm90.cu", "_cuda.h")):
        assert [name for name in sorted(found) if name.startswith("cuda")] == []


def test_only_one_header_includes_the_cuda_toolkit():
    """The header that the emulation in tests/simt replaces."""
    for path in sorted(CSRC.iterdir()):
        toolkit = [name for name in includes(path) if name.startswith(("cuda", "cooperative_groups", "mma"))]
        assert path.name == "cuda_kernel.h" or [name for name in toolkit if not (CSRC / name).is_file()] == [], path


def test_the_python_module_is_apart_from_torch():
    """torch's copy of pybind11 refuses the macro that its stable ABI needs, in some releases: no file may have both."""
    module = CSRC / "module.cpp"
    assert [name for name in sorted(reached(module)) if name.startswith("torch/")] == []
    assert [path.name for path in sorted(CSRC.iterdir()) if any("pybind11" in name for name in reached(path))] == [
        module.name
    ]
    lists = (ROOT / "CMakeLists.txt").read_text()
    sources = re.findall(
        r"set_source_files_properties\(([^)]*?) PROPERTIES COMPILE_DEFINITIONS TORCH_TARGET_VERSION", lists
    )
    assert sources == ["csrc/library.cpp ${glue}"] and lists.count("TORCH_TARGET_VERSION") == 1


@pytest.mark.parametrize("path", sorted(CSRC.glob("*.cu")), ids=relative)
def test_cuda_kernels_can_be_emulated(path: Path):
    assert "cuda_kernel.h" in reached(path)
    assert "<<<" not in path.read_text(), "launch through ALITOK_LAUNCH"


@pytest.mark.parametrize("path", sorted(set(CSRC.glob("*.cu")) - set(CSRC.glob("*_cuda.cu"))), ids=relative)
def test_a_kernel_for_later_devices_is_beside_one_for_all(path: Path):
    operator = path.name.removesuffix("_sm90.cu")
    assert operator in operators() and path.name != operator
    assert (CSRC / f"{operator}_cuda.cu").is_file()
    assert f"csrc/{path.name}" in (ROOT / "CMakeLists.txt").read_text()
    for name in (f"{operator}_cuda.cu", path.name):
        programs = [program.name for program in (ROOT / "tests" / "simt").glob("*.cpp") if name in includes(program)]
        assert programs, f"{name}: no emulated test"


@pytest.mark.parametrize("path", sorted(CSRC.glob("*_cpu.cpp")), ids=relative)
def test_cpu_kernels_use_the_threads_they_are_given(path: Path):
    text = path.read_text()
    assert re.findall(r"std::j?thread|std::async|pthread_create|#\s*pragma omp", text) == []
    assert "ALITOK_ISA" in text, "its code is in namespace alitok::ALITOK_ISA"


@pytest.mark.parametrize("operator", operators())
def test_one_operator_one_stem(operator: str):
    kernel = "cuda.cu" if operator in CUDA_ONLY else "cpu.cpp"
    for name in (f"csrc/{operator}.h", f"csrc/{operator}.cpp", f"csrc/{operator}_{kernel}"):
        assert (ROOT / name).is_file(), name
    assert (PACKAGE / "ops" / f"{operator}.py").is_file()
    for name in (f"tests/ops/test_{operator}.py", f"benchmarks/bench_{operator}.py"):
        assert (ROOT / name).is_file(), name
        assert re.search(rf"\b{operator}\b", (ROOT / name).read_text()), name
    registered = re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "library.cpp").read_text())
    assert operator in registered


def test_every_schema_belongs_to_an_operator():
    registered = re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "library.cpp").read_text())
    assert registered
    assert [name for name in registered if not name.startswith(tuple(operators()))] == []
