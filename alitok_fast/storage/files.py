"""Files that appear whole or not at all, JSON, fingerprints, and the one comparison of settings on resuming."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from alitok_fast.storage.text import first_line, shown

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

SUFFIX = ".alitok-tmp"
"""A file x is written as ".x.alitok-tmp" and renamed: what a killed writer left is overwritten by the next one."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, flush to disk, rename onto `path`; on any failure the old file stays.

    A link at `path` is replaced, not followed. Writers of one file, in any process, take turns.
    Raises what `write` does; where the file system is at fault (disk full, no permission), OSError naming `path`.
    """
    try:
        _write_atomically(path, write)
    except OSError as error:
        text = f"{path} was not written: {error.strerror or error}"
        raise (OSError(error.errno, text) if error.errno else OSError(text)) from error
    except (RuntimeError, SafetensorError) as error:
        # Of a full disk, torch.save only says "unexpected pos 704 vs 598", safetensors "I/O error".
        if not re.search(r"unexpected pos|PytorchStreamWriter|I/O error|IoError", str(error)):
            raise
        raise OSError(f"{path} was not written, the disk may be full: {first_line(error)}") from error


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}{SUFFIX}")
    with _exclusive(temporary) as mode:
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)  # a library may have put a file of its own there, which only its owner can read
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextlib.contextmanager
def _exclusive(path: Path, wait: bool = True) -> Iterator[int]:
    """Create `path` and lock it, for the length of the block; its mode, as the umask has it.

    Where somebody else holds it, wait, or raise BlockingIOError unless `wait`. What a killed holder left is replaced:
    the lock dies with its process. On systems without `fcntl` there is none; a file system without locks (some network
    file systems) is warned of.
    """
    while True:
        try:
            handle, fresh = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), True
        except FileExistsError:
            try:
                handle, fresh = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)), False
            except FileNotFoundError:
                continue
        try:
            _lock(handle, path, wait)
            try:
                current = os.path.samestat(os.stat(path), os.fstat(handle))
            except FileNotFoundError:
                current = False
            if current and fresh:
                yield os.fstat(handle).st_mode & 0o777
                return
            if current:  # else its holder has renamed or removed it meanwhile
                path.unlink()
        finally:
            os.close(handle)


def _lock(handle: int, path: Path, wait: bool) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        _log.warning("%s has no locks: do not let two commands write there at the same time", path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable; nothing where folders cannot be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def leftovers(folder: Path, names: Container[str]) -> list[Path]:
    """Temporary files in `folder` that killed writers of files with these names left there."""
    hidden = [file for file in folder.iterdir() if file.name.startswith(".") and file.name.endswith(SUFFIX)]
    return [file for file in hidden if file.name[1 : -len(SUFFIX)] in names]


def write_json(path: Path, value: object) -> None:
    """Write indented JSON, whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path, what: str = "JSON") -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file and `what` was expected in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what}, got {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected {what}, got a {type(value).__name__}")
    return value


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short hash of weights, by name and value in float32: the same on every device and in every file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Container[str] = ()) -> list[str]:
    """What `before` says otherwise than `now`: "seed: expected 0, got 1", of lists the first entry, in order of `now`.

    Dictionaries inside are compared key by key ("training.lr: ..."). `free` names the keys that may differ.
    """
    found = []
    for key in [*now, *(key for key in before if key not in now)]:
        expected, got = before.get(key), now.get(key)
        if key in free or expected == got:
            continue
        if isinstance(expected, Mapping) and isinstance(got, Mapping):
            found += [f"{key}.{line}" for line in differences(expected, got, free)]
            continue
        if isinstance(expected, list) and isinstance(got, list):
            pairs = [pair for pair in enumerate(zip_longest(expected, got)) if pair[1][0] != pair[1][1]]
            if pairs:
                index, (expected, got) = pairs[0]
                key = f"{key}[{index}]"
            else:
                expected, got = f"{len(expected)} entries", f"{len(got)} entries"
        found.append(f"{key}: expected {_brief(expected)}, got {_brief(got)}")
    return found


def _brief(value: object) -> str:
    return shown(repr(value) if isinstance(value, str) else value)


@contextlib.contextmanager
def locked(path: Path, output: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` of an output (its folder, if not given); the lock dies with its process.

    Where another holds it, raises ValueError, or waits.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_exclusive(path, wait))
        except BlockingIOError:
            raise ValueError(
                f"out: expected an output that nobody writes, got {output or path.parent}, which another process is "
                f"writing (it holds {path})"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
