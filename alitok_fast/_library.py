"""The native extension, and the one switch between native and reference operators."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import shlex
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlparse

import torch

F = TypeVar("F", bound=Callable[..., Any])

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None
"""The source checkout that this package lies in; None where it is installed."""
REBUILD = f"{sys.executable} -m pip install --no-deps " + (
    "--force-reinstall ." if CHECKOUT is None else f"--editable {shlex.quote(str(CHECKOUT))}"
)
"""The command that mends a missing or broken extension; an installed package is mended from a source checkout."""


class _Mode:
    """The switch. A plain attribute, because torch.compile guards on those: code compiled for one setting is compiled
    anew for the other. Context variables it cannot trace, thread-local ones it would not notice change."""

    reference = False


_mode = _Mode()


def _is_whole(file: Path) -> bool:
    """Whether an ELF file reaches as far as its header says. Loading one cut short kills the process (SIGBUS)."""
    with file.open("rb") as stream:
        header = stream.read(64)
    if header[:5] != b"\x7fELF\x02" or len(header) < 64:
        return len(header) == 64  # another format: the loader's own errors have to do
    sections_at, entry_size, entries = struct.unpack_from("<Q10xHH", header, 40)
    return file.stat().st_size >= sections_at + entry_size * entries


def _load() -> ImportError | None:
    spec = importlib.util.find_spec("alitok_fast._C")
    if spec is not None and spec.origin is not None and not _is_whole(Path(spec.origin)):
        return ImportError("the file is cut short")
    try:
        import alitok_fast._C  # noqa: F401  (importing it registers torch.ops.alitok)
    except ImportError as error:
        return error
    return None


load_error: ImportError | None = _load()
"""Why the extension could not be loaded; None when it is there."""


def explain(error: ImportError) -> str:
    """What is wrong with the extension, and the command that mends it."""
    built = sorted(path.name for path in PACKAGE.glob("_C*.so"))
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    if not built:
        state = f"missing: no _C*.so in {PACKAGE}"
    elif f"_C{suffix}" not in built:
        state = f"missing: expected _C{suffix}, for this Python, in {PACKAGE}, got {', '.join(built)}, for another"
    else:
        state = f"broken: _C{suffix} cannot be loaded ({error})"
    return (
        f"alitok_fast: its native extension is {state}.\n{_mend()}\n"
        "Slow PyTorch operators instead: with alitok_fast.use_reference(): ..."
    )


def _mend() -> str:
    if CHECKOUT is None:
        return f"Mend it from a source checkout with: {REBUILD}"
    hidden = hidden_installation()
    if hidden is None:
        return f"Build it in this checkout with: {REBUILD}    (or: make build)"
    return (
        f"The source checkout {CHECKOUT} hides the installed package in {hidden}, because Python looks "
        "there first: it is the current folder, the script's, or on PYTHONPATH.\n"
        f"Start Python in another folder, or build this checkout in place with: {REBUILD}"
    )


def hidden_installation() -> Path | None:
    """Folder of another alitok_fast, with an extension, that Python would import were this one not found first."""
    places = [entry for entry in sys.path if Path(entry or ".").resolve() != PACKAGE.parent]
    for finder in sys.meta_path:
        if not hasattr(finder, "find_spec"):
            continue
        is_path_finder = getattr(finder, "__name__", "") == "PathFinder"
        found = finder.find_spec(
            "alitok_fast", places if is_path_finder else None
        )  # the others: editable installations
        folder = Path(found.origin).resolve().parent if found is not None and found.origin else PACKAGE
        if folder != PACKAGE and any(folder.glob("_C*.so")):
            return folder
    return None


def install_hint(extra: str) -> str:
    """The command that adds the libraries of an extra ("train", "hub", ...) to this installation of the package."""
    if CHECKOUT is not None:
        where = "." if Path.cwd() == CHECKOUT else str(CHECKOUT)
        return f"pip install --editable '{where}[{extra}]'"
    try:
        written = importlib.metadata.distribution("alitok_fast").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        written = None
    origin = json.loads(written) if written else {}
    if "vcs_info" in origin:
        return f"pip install 'alitok_fast[{extra}] @ {origin['vcs_info']['vcs']}+{origin['url']}'"
    if "dir_info" in origin:
        return f"pip install '{unquote(urlparse(origin['url']).path)}[{extra}]'"
    return f"pip install 'alitok_fast[{extra}]'"


def native_enabled() -> bool:
    """Whether operators run natively here; False inside `use_reference`.

    Raises:
        ImportError: when native operators are wanted and the extension is missing or broken.
    """
    if _mode.reference:
        return False
    if load_error is not None:
        raise ImportError(explain(load_error)) from load_error
    return True


def detected_cpu_isa() -> str | None:
    """The best instruction set of this machine: "scalar", "avx2" or "avx512"; None without the extension."""
    if load_error is not None:
        return None
    from alitok_fast import _C

    return _C.detected_cpu_isa()


@contextlib.contextmanager
def use_reference(enabled: bool = True) -> Iterator[None]:
    """Run the pure-PyTorch reference operators inside this block, in all threads."""
    before = _mode.reference
    _mode.reference = enabled
    try:
        yield
    finally:
        _mode.reference = before


def _require(operator: str) -> None:
    if not hasattr(torch.ops.alitok, operator):
        raise ImportError(explain(ImportError(f"no operator {operator} in it: built from older sources")))


def register_fake(operator: str) -> Callable[[F], F]:
    """Decorator: the fake (meta) kernel of `alitok::<operator>`; does nothing where the extension is not loaded."""
    if load_error is not None:
        return lambda function: function
    _require(operator)
    return torch.library.register_fake(f"alitok::{operator}")


def register_autograd(operator: str, backward: Callable[..., object], setup_context: Callable[..., None]) -> None:
    """The derivative of `alitok::<operator>`; does nothing where the extension is not loaded."""
    if load_error is None:
        _require(operator)
        torch.library.register_autograd(f"alitok::{operator}", backward, setup_context=setup_context)
