"""Data sets of Hugging Face's `datasets`, saved on disk or loaded by name: a column of pictures, and one of labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alitok_fast.data.encoded import EncodedImages
from alitok_fast.data.labels import NOTHING, ClassFile, label_number, number_labels
from alitok_fast.data.left_out import LeftOut
from alitok_fast.data.optional import optional
from alitok_fast.data.pictures import UnreadableImageError
from alitok_fast.storage.text import first_line, shown

PREFIX = "hf:"
_ROWS = 10_000  # looked at together
_NAME = re.compile(r"hf:(?P<name>[^:]+)(?::(?P<split>.+))?")


def holds_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`, of one split or of several."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


class HuggingFaceImages(EncodedImages):
    """A data set of the library `datasets`: a folder by `save_to_disk`, or "hf:NAME" or "hf:NAME:SPLIT" by its name.

    The pictures are those of the only column of type Image, or of `image_column`. The classes are those of the only
    column of type ClassLabel, or of `label_column`, which may hold class numbers, or names that are numbered as
    `classes` says or else sorted, those of all splits together; "none" makes one class. Files that a data set refers
    to are read where they are.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        classes: ClassFile | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        **reading,
    ) -> None:
        chosen, others, name = _open(path, split)
        image = _column(chosen, image_column, "Image", "image_column", path)
        label = None if label_column == "none" else _column(chosen, label_column, "ClassLabel", "label_column", path)
        names, labels, wrong = _labels(chosen, others, label, classes, path)
        self._pictures = chosen.select_columns([image]).cast_column(image, _datasets().Image(decode=False))
        self._column, self._path = image, path
        super().__init__(name, names or [name], labels, LeftOut(), **reading)
        self.keep_labelled(wrong)

    def encoded(self, index: int) -> Path | bytes:
        picture = self._pictures[int(self._rows[index])][self._column]
        if picture is not None and picture["bytes"] is not None:
            return picture["bytes"]
        if picture is None or not picture["path"] or "://" in picture["path"]:
            raise UnreadableImageError(f"{self.location(index)}: expected a picture, got {shown(picture)}")
        return Path(picture["path"])

    def sample_name(self, index: int) -> str:
        return f"row {int(self._rows[index])}"

    def location(self, index: int) -> str:
        return f"{self._path}: {self.sample_name(index)}"

    def entries(self) -> Iterator[bytes]:
        for array in (self._sizes(), self._rows, self.labels):
            yield array.tobytes()

    def _sizes(self) -> np.ndarray:
        """(rows,) bytes of each picture, 0 where it is a file elsewhere. The pictures themselves are not read."""
        arrow = optional("pyarrow.compute", "a data set of Hugging Face")
        sizes = []
        for rows in self._pictures.with_format("arrow").iter(_ROWS):
            lengths = arrow.binary_length(arrow.struct_field(rows.column(self._column), "bytes"))
            sizes.append(np.asarray(lengths.fill_null(0), np.int64))
        return np.concatenate(sizes)


def _datasets() -> Any:
    return optional("datasets", "a data set of Hugging Face")


def _open(path: str, split: str) -> tuple[Any, list[Any], str]:
    """The split, the other splits, and what the data are called."""
    library = _datasets()
    match = _NAME.fullmatch(path)
    if path.startswith(PREFIX) and match is None:
        raise ValueError(f"data: expected hf:NAME or hf:NAME:SPLIT, got {path!r}")
    name, split = (match["name"], match["split"] or split) if match else (path, split)
    try:
        if match is None:
            found = library.load_from_disk(path)
        else:  # a part of a split, as in train[:10%], is made by the library; otherwise all splits name the classes
            found = library.load_dataset(name, split=split if "[" in split else None)
    except Exception as error:  # missing data sets, splits, networks, damaged files: as many types of error
        raise ValueError(f"data: expected a data set of Hugging Face at {path}, got {first_line(error)}") from error
    if isinstance(found, library.DatasetDict):
        if split not in found:
            known = ", ".join(map(repr, found))
            raise ValueError(f"split: expected one of {known}, the splits of {path}, got {split!r}")
        others = [other for key, other in found.items() if key != split]
        return found[split], others, f"{Path(name).name}/{split}"
    if match is None and split not in ("train", str(found.split)):
        raise ValueError(f"split: expected 'train', since {path} holds no splits, got {split!r}")
    return found, [], Path(name).name if match is None else f"{Path(name).name}/{split}"


def _column(data: Any, name: str | None, kind: str, argument: str, path: str) -> str | None:
    """The column called `name`, or the only one of a type; no label column is no mistake."""
    columns = {column: type(feature).__name__ for column, feature in data.features.items()}
    if name is not None:
        if name not in columns or (kind == "Image" and columns[name] != kind):
            fit = [column for column in columns if kind != "Image" or columns[column] == kind]
            raise ValueError(f"{argument}: expected one of {', '.join(map(repr, fit))} in {path}, got {name!r}")
        return name
    fit = [column for column, found in columns.items() if found == kind]
    if len(fit) == 1 or (kind == "ClassLabel" and not fit and "label" not in columns):
        return fit[0] if fit else None
    if kind == "ClassLabel" and "label" in columns:
        return "label"
    known = ", ".join(f"{shown(column)} ({found})" for column, found in columns.items())
    raise ValueError(f"{argument}: expected the name of a column, since {path} has {len(fit)} of type {kind}: {known}")


def _labels(data: Any, others: list[Any], column: str | None, classes: ClassFile | None, path: str):
    """`number_labels` of a column, of all splits together."""
    if column is None:
        return number_labels(np.full(len(data), NOTHING), [], np.full(len(data), NOTHING), classes, path)
    feature = data.features[column]
    names = getattr(feature, "names", None)
    values: list[Any] = _values(data, column)
    for other in others:
        values += _values(other, column) if column in other.features else []
    texts = sorted({value for value in values if isinstance(value, str)})
    order = {text: number for number, text in enumerate(texts)}
    ids = np.array([order.get(value, -1) if isinstance(value, str) else -1 for value in values], np.int64)
    numbers = np.array([_number(value) for value in values], np.int64)
    found, labels, wrong = number_labels(numbers, texts, ids, classes, f"label_column: {path}")
    count = len(data)
    wrong = {reason: mask[:count] for reason, mask in wrong.items()}
    return (list(names) if names and classes is None else found), labels[:count], wrong


def _number(value: Any) -> int:
    return NOTHING if value is None or isinstance(value, str) else label_number(value)


def _values(data: Any, column: str) -> list[Any]:
    """A column as Python values. The other columns, pictures among them, are not read."""
    return list(data.select_columns([column]).with_format(None)[column])
