"""A token cache as parquet files, as data sets are published."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from alitok_fast.data.checks import require_count
from alitok_fast.data.parquet_facts import METADATA_KEY, ParquetColumns
from alitok_fast.data.parquet_table import pyarrow
from alitok_fast.data.token_cache import TokenCache
from alitok_fast.storage.files import write_atomically

ROWS_PER_FILE = 100_000
_ROWS_PER_GROUP = 4096


def export_parquet(
    cache: TokenCache,
    out: str | Path,
    rows_per_file: int = ROWS_PER_FILE,
    columns: ParquetColumns | None = None,
    force: bool = False,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Path]:
    """Write a cache as tokens-00000-of-0000N.parquet, one row per image, into the folder `out`; the files.

    The schema's metadata hold those of the cache, so that `import_parquet` restores all of it, and the features that
    Hugging Face's `datasets` reads: tokens as an array (crops, N), labels with their names. Each file appears whole or
    not at all. Raises ValueError where `out` holds parquet files already, unless `force`, which removes such files of
    an earlier export; ImportError without pyarrow.
    """
    require_count("rows_per_file", rows_per_file)
    columns = columns or ParquetColumns()
    if columns.image is not None or columns.tokens == columns.label:
        raise ValueError(f"columns: expected a name for the tokens and another for the labels, got {columns}")
    arrow, out = pyarrow(), Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}")
    there = sorted(out.glob("*.parquet"))
    if there and not force:
        raise ValueError(f"out: expected a folder without parquet files, got {there[0]}; choose another, or --force")
    out.mkdir(parents=True, exist_ok=True)
    for file in there:
        if re.fullmatch(r"tokens-\d{5}-of-\d{5}\.parquet", file.name):
            file.unlink()
    firsts = range(0, len(cache), rows_per_file)
    files = [out / f"tokens-{number:05}-of-{len(firsts):05}.parquet" for number in range(len(firsts))]
    for first, file in zip(progress(firsts), files, strict=True):
        images = range(first, min(first + rows_per_file, len(cache)))
        write = functools.partial(_write, cache=cache, schema=_schema(arrow, cache, columns, first), images=images)
        write_atomically(file, write)
    return files


def _schema(arrow: Any, cache: TokenCache, columns: ParquetColumns, first: int) -> Any:
    meta = cache.meta
    dtype = meta.dtype.name
    own = {"cache": meta.to_dict(), "columns": {"tokens": columns.tokens, "label": columns.label}, "first": first}
    features = {
        columns.tokens: {"shape": list(meta.shape[1:]), "dtype": dtype, "_type": "Array2D"},
        columns.label: {"names": meta.class_names, "_type": "ClassLabel"},
    }
    described = {METADATA_KEY: json.dumps(own), "huggingface": json.dumps({"info": {"features": features}})}
    tokens = arrow.list_(arrow.list_(arrow.from_numpy_dtype(dtype)))
    return arrow.schema([(columns.tokens, tokens), (columns.label, arrow.int64())], described)


def _write(path: Path, cache: TokenCache, schema: Any, images: range) -> None:
    arrow = pyarrow()
    # A code of few bits each: pages of 12-bit numbers, of a dictionary, are three quarters of the cache's size.
    with pyarrow("parquet").ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for first in range(images.start, images.stop, _ROWS_PER_GROUP):
            part = slice(first, min(first + _ROWS_PER_GROUP, images.stop))
            tokens: np.ndarray = np.ascontiguousarray(cache.tokens[part])
            cells = arrow.array(tokens.reshape(-1))
            for size in reversed(tokens.shape[1:]):
                offsets = np.arange(0, len(cells) + 1, size, dtype=np.int32)
                cells = arrow.ListArray.from_arrays(offsets, cells)
            writer.write_table(arrow.table([cells, arrow.array(cache.labels[part])], schema=schema))
