"""Labels and class names from text files: the lists that ImageNet users have, and files that name the classes."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alitok_fast.data.left_out import BAD_LABEL, MOST_CLASSES, NO_LABEL, OUT_OF_RANGE, Reason
from alitok_fast.storage.text import first_line, shown

LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".lst"})
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"[+-]?\d{1,18}")
_RUNNING = 100  # so many lines with the numbers 1, 2, 3, ... are no accident
_HEADINGS = frozenset(
    {"path", "file", "filename", "file_name", "image", "image_path", "imageid", "image_id", "img", "name"}
)


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not empty; ValueError names a file that is no UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: expected a text file in UTF-8, got {first_line(error)}") from None
    return [line.strip() for line in text.splitlines() if line.strip() and "\0" not in line]


def read_list(path: Path) -> list[tuple[str, str]]:
    """(file, label) of each line of a list: separated by a comma (.csv), a tab (.tsv), or else by the last blank.

    A line of headings is left out. Of several words in a label (LOC_val_solution.csv has boxes) the first counts. A
    line without a file gives an empty one. ValueError names the file and the line.
    """
    lines, entries = lines_of(path), []
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    try:
        rows = list(csv.reader(lines, delimiter=separator)) if separator else [_split(line) for line in lines]
    except csv.Error as error:
        raise ValueError(f"{path}: expected lines of 'path{separator}label', got {first_line(error)}") from None
    if rows and len(rows[0]) > 1 and rows[0][0].strip().lower() in _HEADINGS:
        rows = rows[1:]
    for number, row in enumerate(rows, 1):
        if len(row) > 2 or not row[-1].strip() or (len(row) == 2 and not row[0].strip()):
            found = shown((separator or " ").join(row))
            raise ValueError(f"{path}: expected a path and a label in entry {number}, got {found!r}")
        label = unicodedata.normalize("NFC", row[-1].split()[0] if separator else row[-1])
        entries.append((row[0].strip() if len(row) == 2 else "", label))
    if not entries:
        raise ValueError(f"{path}: expected lines of a path and a label, got none")
    _refuse_running_numbers(path, entries)
    return entries


def _refuse_running_numbers(path: Path, entries: list[tuple[str, str]]) -> None:
    """ImageNet's ImageSets/CLS-LOC lists number their lines: as labels they would make a class of each picture."""
    labels = [label for _, label in entries]
    if len(labels) >= _RUNNING and labels == [str(number) for number in range(1, len(labels) + 1)]:
        raise ValueError(
            f"{path}: expected a class in each line, got the running numbers 1 to {len(labels)}; take another list"
            f" (LOC_val_solution.csv), or the folder that holds {shown(entries[0][0])!r}"
        )


def _split(line: str) -> list[str]:
    return line.rsplit("\t", 1) if "\t" in line else line.rsplit(None, 1)


def is_wnid(name: str) -> bool:
    """Whether a class is called as in WordNet and ImageNet: n and eight digits."""
    return _WNID.fullmatch(name) is not None


def is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def read_class_names(path: Path) -> ClassFile:
    """The classes that a file names, one a line: names in the order of their numbers, or wnids, each with its name."""
    lines = [line.split(None, 1) for line in lines_of(path)]
    if not lines:
        raise ValueError(f"{path}: expected class names, one per line, got none")
    if all(is_wnid(words[0]) for words in lines):
        return ClassFile(path, [words[0] for words in lines], [words[-1] for words in lines])
    names = [" ".join(words) for words in lines]
    return ClassFile(path, names, names)


class ClassFile:
    """What a file says about classes: `keys` are how labels call them, `names` what people do, in order of number."""

    def __init__(self, path: Path, keys: list[str], names: list[str]) -> None:
        if len(set(keys)) < len(keys):
            twice = next(key for number, key in enumerate(keys) if key in keys[:number])
            raise ValueError(f"{path}: expected each class once, got {shown(twice)!r} twice")
        self.path, self.keys, self.names = path, keys, names

    def renamed(self, classes: Sequence[str]) -> list[str]:
        """`classes` by the file's names; those that it does not know keep theirs. ValueError where it knows none."""
        known = dict(zip(self.keys, self.names, strict=True))
        if not known.keys() & set(classes):
            raise ValueError(
                f"class_names: expected names of classes such as {shown(classes[0])!r}, got none of them in {self.path}"
            )
        return [known.get(name, name) for name in classes]


NOTHING, NEGATIVE, NONSENSE = -1, -2, -3
"""Numbers of samples that have none: no label at all, one below 0, one that is neither a number nor a name."""


def label_number(value: object) -> int:
    """A label given as a number or as digits, or one of the above where it is none."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        return NONSENSE
    return min(int(value), MOST_CLASSES) if value >= 0 else NEGATIVE


def number_labels(
    numbers: np.ndarray, texts: Sequence[str], text_ids: np.ndarray, classes: ClassFile | None, where: str
) -> tuple[list[str], np.ndarray, dict[Reason, np.ndarray]]:
    """Class names, and labels (len,) of samples with `numbers` (len,) or with `texts[text_ids]` (id -1: none).

    Numbers are labels as they are; texts are numbered in the order of `classes`, without them in their own. Where no
    sample has either, there are no names and all labels are 0. Also gives, for each reason, which samples (len,) have
    no usable label; theirs is 0. ValueError, beginning with `where`, for numbers mixed with names.
    """
    has_number, has_text = numbers >= 0, text_ids >= 0
    if has_number.any() and has_text.any():
        example = shown(texts[int(text_ids[has_text][0])])
        raise ValueError(f"{where}: expected labels of one kind, got numbers as well as names (such as {example!r})")
    nothing = (numbers == NOTHING) & ~has_text
    if nothing.all():
        return [], np.zeros(len(numbers), np.int64), {}
    wrong = {NO_LABEL: nothing, BAD_LABEL: numbers == NONSENSE, OUT_OF_RANGE: numbers == NEGATIVE}
    if has_text.any():
        keys = classes.keys if classes else sorted(set(texts))
        order = {key: number for number, key in enumerate(keys)}
        of_text = np.array([order.get(text, -1) for text in texts], np.int64)
        labels = np.where(has_text, of_text[np.maximum(text_ids, 0)], -1)
        wrong[OUT_OF_RANGE] |= has_text & (labels < 0)
        names = classes.names if classes else keys
    else:
        labels = np.where(numbers < (len(classes.names) if classes else MOST_CLASSES), numbers, -1)
        wrong[OUT_OF_RANGE] |= has_number & (labels < 0)
        names = classes.names if classes else [str(number) for number in range(int(labels.max(initial=-1)) + 1)]
    return names, np.maximum(labels, 0), wrong
