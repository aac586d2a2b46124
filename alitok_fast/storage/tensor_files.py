"""Tensors out of one file: `.safetensors`, read from a checked header, and pickles, read as data alone.

Everything read here is a copy: what happens to the file afterwards does not reach a model made of it. Pickles are
opened with `weights_only=True`, so a file that would run code is refused.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alitok_fast.storage.text import first_line, shown

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
# How far the tensors of a pickle may exceed its file, since several of them may be views of one storage.
SHARING, SHARING_BYTES = 4, 2**26

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """A tensor of a safetensors file: `begin` and `end` are its bytes, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(path: Path, check: Callable[[Mapping[str, Any]], object]) -> Any:
    """What a file holds: the tensors of a `.safetensors` by name, or whatever a pickle holds.

    `check` is called with things that have a `.shape`, by name, before a `.safetensors` is read any further than its
    header. Raises ValueError or OSError naming the file.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: expected a file ending in one of {', '.join(SUFFIXES)}, got {path.name}")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise ValueError(f"{path}: expected a file, got something else, such as a folder or a pipe")
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                entries = _read_header(file, path)
                check(entries)
                return {name: _read_entry(file, entry, path) for name, entry in entries.items()}
            return _read_pickle(file, path)
    except OSError as error:
        raise type(error)(error.errno, f"{path} cannot be read: {error.strerror or error}") from None


def _read_header(file: BufferedReader, path: Path) -> dict[str, Entry]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(LARGEST_HEADER, size - 8):
        raise _damaged(path, size, f"a header of {length} bytes" if size >= 8 else "no header")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = {name: _entry(value, 8 + length) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, size, f"a header that cannot be read: {shown(first_line(error))}") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != end:
            raise _damaged(path, size, f"{shown(name)} at byte {entry.begin} where {end} is expected")
        end = entry.end
    if end != size:
        raise _damaged(path, size, f"tensors that end at byte {end}")
    return entries


def _entry(value: dict[str, Any], start: int) -> Entry:
    name, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if name not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {name!r}")
    if not all(type(number) is int and 0 <= number < 2**40 for number in (*shape, begin, end)):
        raise ValueError(f"expected sizes and offsets from 0 to 2**40, got {shape}, {begin}, {end}")
    if end - begin != math.prod(shape) * _DTYPES[name].itemsize:
        raise ValueError(f"expected {math.prod(shape)} elements of {name}, got {end - begin} bytes")
    return Entry(_DTYPES[name], shape, start + begin, start + end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same name twice")
    return found


def _read_entry(file: BufferedReader, entry: Entry, path: Path) -> Tensor:
    """Into memory of the tensor's own: no map of the file, which would change or end with it, and no second copy."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    if tensor.numel():
        file.seek(entry.begin)
        data = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
        if file.readinto(data) != len(data):
            raise _damaged(path, os.fstat(file.fileno()).st_size, "fewer bytes than its header names")
    return tensor


def _read_pickle(file: BufferedReader, path: Path) -> Any:
    size = os.fstat(file.fileno()).st_size
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
            if (
                any(part.compress_type != zipfile.ZIP_STORED for part in parts)
                or sum(part.file_size for part in parts) > size
            ):  # torch.save compresses nothing: a small file that unpacks into a large one
                raise _damaged(path, size, "compressed parts")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {_refused(error)}") from None
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # which a seek to a place that garbage names gives
            raise
        raise _damaged(path, size, shown(first_line(error))) from None
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise _damaged(path, size, shown(first_line(error))) from None
    except Exception as error:  # fed garbage, the unpickler raises nearly anything: KeyError, RecursionError, ...
        raise _damaged(path, size, shown(first_line(error))) from None
    return loaded


def _damaged(path: Path, size: int, why: str) -> ValueError:
    return ValueError(
        f"{path}: expected a complete {path.suffix} checkpoint, got a truncated or foreign file of {size} bytes ({why})"
    )


def _refused(error: pickle.UnpicklingError) -> str:
    """What torch's refusal to unpickle comes to; its own text also says how to load the file all the same."""
    kind = re.search(r"GLOBAL ([\w.]+)", str(error))
    if kind is None:
        return (
            "expected a plain dictionary of tensors, got a pickle that needs code to run, or a damaged one; "
            f"refused, nothing was executed ({shown(first_line(error))})"
        )
    return (
        f"expected a plain dictionary of tensors, got a pickle that also holds a {shown(kind.group(1))}; refused, "
        'nothing was executed. Where it was written, save the weights alone: torch.save(checkpoint["model"], path)'
    )


def check_loaded(state: Mapping[str, Tensor], path: Path) -> None:
    """ValueError unless all are plain floating-point tensors, of no more memory than such a file can hold."""
    for name, tensor in state.items():
        floating = tensor.dtype in _DTYPES.values() and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not floating:
            raise ValueError(
                f"{path}: {shown(name)}: expected a float16, bfloat16, float32 or float64 tensor, got "
                f"{str(tensor.dtype).removeprefix('torch.')}, {str(tensor.layout).removeprefix('torch.')} on "
                f"{tensor.device}"
            )
    total, size = sum(tensor.numel() * tensor.itemsize for tensor in state.values()), path.stat().st_size
    if total > SHARING * size + SHARING_BYTES:
        raise ValueError(f"{path}: expected tensors of about the file's {size} bytes, got {total} bytes of them")


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each tensor in memory of its own: tied ones become copies, and parts of larger ones bring no rest."""
    tensors, seen = {}, set()
    for name, tensor in state.items():
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # sharded over processes
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.itemsize:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def read_metadata(path: Path) -> dict[str, str] | None:
    """What a `.safetensors` says about itself; None where it says nothing, or is no such file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(LARGEST_HEADER, os.fstat(file.fileno()).st_size):
                return None
            return json.loads(file.read(length).decode()).get("__metadata__")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
