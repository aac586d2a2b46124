"""The native extension, and the one switch between native and reference operators."""

from __future__ import annotations

import contextlib
import importlib.util
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

REBUILD = f"{sys.executable} -m pip install --force-reinstall --no-deps ."
"""The command that mends a missing or broken extension, in a source checkout."""


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
    if spec is not None and not _is_whole(Path(spec.origin)):
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
    folder = Path(__file__).parent
    built = sorted(path.name for path in folder.glob("_C*.so"))
    state = f"{built[0]} cannot be loaded ({error})" if built else f"no _C*.so in {folder}"
    return (
        f"alitok_fast: its native extension is {'broken' if built else 'missing'}: {state}.\n"
        f"Mend it from a source checkout with: {REBUILD}    (or in place: make build)\n"
        "Slow PyTorch operators instead: with alitok_fast.use_reference(): ..."
    )


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
