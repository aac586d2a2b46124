"""Parquet files read as one table, a piece of a row group at a time. What is wrong is named by file, row group, column.

pyarrow is an optional library, and is imported when it is first needed.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alitok_fast._library import install_hint
from alitok_fast.storage.text import first_line, shown

_BATCH_ROWS = 1024
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.parquet")  # as Hugging Face's libraries name the files of a split


def pyarrow(module: str = "") -> Any:
    """pyarrow, or one of its modules; ImportError with the command that installs it."""
    try:
        return importlib.import_module(f"pyarrow.{module}" if module else "pyarrow")
    except ImportError:
        raise ImportError(f"parquet files need pyarrow: {install_hint('parquet')}") from None


def find_parquet(paths: Sequence[str | Path]) -> list[Path]:
    """The parquet files that `paths` name: files, patterns such as "data/train-*.parquet", and folders with all inside.

    Raises ValueError where there are none, or where a folder holds several splits or one that is not whole.
    """
    files: list[Path] = []
    for path in paths:
        folder = Path(path)
        if folder.is_dir():
            found = sorted(file for file in folder.rglob("*.parquet") if not file.name.startswith("."))
            _check_split(folder, found)
        else:
            found = [folder] if folder.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            raise ValueError(f"parquet: expected files or a folder with *.parquet, got {path}, where there are none")
        files += found
    twice = [file for file, count in Counter(file.resolve() for file in files).items() if count > 1]
    if twice:
        raise ValueError(f"parquet: expected each file once, got {twice[0]} again")
    return files


def _check_split(folder: Path, files: list[Path]) -> None:
    matches = [match for file in files if (match := _NUMBERED.fullmatch(file.name))]
    splits = sorted({match[1] for match in matches})
    if len(splits) > 1:
        raise ValueError(
            f"parquet: expected the files of one split, got {', '.join(splits)} in {folder}; name one by a pattern, "
            f"such as '{folder}/**/{splits[0]}-*.parquet'"
        )
    if matches:
        total, numbers = int(matches[0][3]), {int(match[2]) for match in matches}
        missing = sorted(set(range(total)) - numbers)
        if missing:
            name = f"{splits[0]}-{missing[0]:05}-of-{total:05}.parquet"
            raise ValueError(f"parquet: expected {total} files in {folder}, got {len(numbers)}: {name} is missing")


@dataclass(frozen=True)
class RowGroup:
    """One row group of a file."""

    file: Path
    number: int
    rows: int

    def error(self, column: str, expected: str, got: str) -> ValueError:
        return ValueError(
            f"{self.file}: row group {self.number}, column {column!r}: expected {expected}, got {shown(got)}"
        )


class ParquetFile:
    """What the footer of a file says."""

    def __init__(self, path: Path) -> None:
        arrow = pyarrow()
        try:
            with pyarrow("parquet").ParquetFile(path) as opened:
                self.footer, schema = opened.metadata, opened.schema_arrow
                self.columns = list(schema.names)
            rows = [self.footer.row_group(number).num_rows for number in range(self.footer.num_row_groups)]
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path}: expected a parquet file, got {first_line(error)}") from None
        if rows and min(rows) < 0:
            raise ValueError(f"{path}: expected a parquet file, got a row group of {min(rows)} rows")
        self.path = path
        self.metadata: dict[bytes, bytes] = schema.metadata or {}
        self.groups = [RowGroup(path, number, count) for number, count in enumerate(rows)]
        self.rows = sum(rows)

    def json(self, key: str) -> dict[str, Any]:
        """The object under `key` of the schema's metadata; empty where there is none."""
        try:
            value = json.loads(self.metadata.get(key.encode(), b"{}"))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}: metadata {key!r}: expected a JSON object, got another value")
        return value

    def check_column(self, option: str, name: str) -> None:
        if name not in self.columns:
            known = ", ".join(map(repr, self.columns))
            raise ValueError(f"{self.path}: {option}: expected one of {shown(known, 400)}, got {name!r}")

    def fingerprint(self) -> bytes:
        """A hash of the footer: where each page lies, how long it is, and the statistics of its values."""
        with self.path.open("rb") as file:
            file.seek(-self.footer.serialized_size - 8, 2)
            return hashlib.sha256(file.read()).digest()

    def batches(self, group: RowGroup, column: str) -> Iterator[tuple[int, Any]]:
        """The arrow arrays of a column, each of at most 1,024 rows, and the first row of each."""
        arrow, row = pyarrow(), 0
        try:
            with pyarrow("parquet").ParquetFile(
                self.path, metadata=self.footer, page_checksum_verification=True
            ) as opened:
                pieces = opened.iter_batches(_BATCH_ROWS, row_groups=[group.number], columns=[column])
                for array in (piece.column(0) for piece in pieces):
                    yield row, array.storage if isinstance(array, arrow.ExtensionArray) else array
                    row += len(array)
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise group.error(column, "data that can be read", first_line(error)) from None
        if row != group.rows:
            raise group.error(column, f"{group.rows} rows, as the footer says", f"{row}")

    def scalars(self, group: RowGroup, column: str, integers: bool = True) -> np.ndarray:
        """A column of whole numbers, or of numbers or text where not `integers`, (rows,)."""
        found = [_scalars(group, column, row, array, integers) for row, array in self.batches(group, column)]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def lists(self, group: RowGroup, column: str, skip: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """A column of lists of whole numbers, or of lists of such lists, as arrays (rows, n) or (rows, m, n).

        Without the first `skip` rows; with the number of the first row of each array.
        """
        for row, array in self.batches(group, column):
            begin = max(row, skip)
            if begin < row + len(array):
                yield begin, _lists(group, column, begin, array.slice(begin - row))


def _scalars(group: RowGroup, column: str, row: int, array: Any, integers: bool) -> np.ndarray:
    types = pyarrow("types")
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    _require_values(group, column, row, array)
    if integers and not types.is_integer(array.type):
        raise group.error(column, "whole numbers", f"{array.type}")
    if types.is_nested(array.type):
        raise group.error(column, "numbers or text", f"{array.type}")
    return array.to_numpy(zero_copy_only=False)


def _lists(group: RowGroup, column: str, row: int, array: Any) -> np.ndarray:
    types, compute = pyarrow("types"), pyarrow("compute")
    shape = [len(array)]
    while types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        _require_values(group, column, row, array, math.prod(shape[1:]))
        lengths = compute.list_value_length(array).to_numpy(zero_copy_only=False)
        uneven = np.flatnonzero(lengths != lengths[0])
        if len(uneven) or not lengths[0]:
            at = int(uneven[0]) if len(uneven) else 0
            expected = f"lists of {lengths[0]}" if len(uneven) else "lists of tokens"
            raise group.error(column, expected, f"{lengths[at]} in row {row + at // math.prod(shape[1:])}")
        shape.append(int(lengths[0]))
        array = array.flatten()
    if not types.is_integer(array.type) or not 2 <= len(shape) <= 3:
        raise group.error(
            column, "lists of whole numbers, or lists of such lists", f"{array.type} {len(shape) - 1} deep"
        )
    _require_values(group, column, row, array, math.prod(shape[1:]))
    return array.to_numpy(zero_copy_only=True).reshape(shape)


def _require_values(group: RowGroup, column: str, row: int, array: Any, per_row: int = 1) -> None:
    if array.null_count:
        at = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise group.error(column, "a value everywhere", f"none in row {row + at // per_row}")
