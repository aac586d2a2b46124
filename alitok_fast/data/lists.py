"""Pictures by a list: a text or CSV file with a path and a label in each line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from alitok_fast.data.encoded import PictureFiles
from alitok_fast.data.labels import NOTHING, ClassFile, is_number, label_number, number_labels, read_list
from alitok_fast.data.left_out import HIDDEN, MISSING, SPLIT_NAMES, LeftOut, Reason, is_junk

_SUFFIXES = (".JPEG", ".jpg", ".jpeg", ".png", ".webp")


class ListImages(PictureFiles):
    """The pictures that a list names, under `root` (the list's folder, if not given).

    Labels are numbers, or names such as wnids. Names are numbered in the order of `classes`, or else sorted, together
    with those of the lists of other splits beside this one (train.txt and val.txt): a class has one label in all of
    them. Lines without a label make one class. Files that are not there are counted in `left_out`.
    """

    def __init__(self, path: Path, root: Path | None = None, classes: ClassFile | None = None, **reading) -> None:
        root = path.parent if root is None else root
        if not root.is_dir():
            raise ValueError(f"root: expected a folder, got {root}")
        entries = read_list(path)
        if all(not name for name, _ in entries):
            entries = [(label, "") for _, label in entries]  # a list of paths alone
        others = [label for other in _other_splits(path) for _, label in read_list(other)]
        names, labels, wrong = number_texts([label for _, label in entries], others, classes, path)
        left_out, files, kept = LeftOut(), [], []
        for index, (name, _) in enumerate(entries):
            file = None if is_junk(os.path.basename(name)) else with_suffix(root, name)
            if file is None:
                left_out.add(HIDDEN if is_junk(os.path.basename(name)) else MISSING, name)
            else:
                files.append(file)
                kept.append(index)
        super().__init__(root, files, path.name, names or [path.stem], labels[kept], left_out, **reading)
        self.keep_labelled({reason: mask[kept] for reason, mask in wrong.items()})


def number_texts(
    labels: list[str], others: list[str], classes: ClassFile | None, where: Path
) -> tuple[list[str], np.ndarray, dict[Reason, np.ndarray]]:
    """`number_labels` of labels that are written in a list, numbers or names; `others` are those of other splits."""
    every = [*labels, *others]
    numbers = [label_number(label) if is_number(label) else NOTHING for label in every]
    texts = sorted({label for label, number in zip(every, numbers, strict=True) if number == NOTHING} - {""})
    order = {text: number for number, text in enumerate(texts)}
    ids = [order.get(label, -1) for label in every]
    names, found, wrong = number_labels(
        np.array(numbers, np.int64), texts, np.array(ids, np.int64), classes, str(where)
    )
    return names, found[: len(labels)], {reason: mask[: len(labels)] for reason, mask in wrong.items()}


def with_suffix(folder: Path, name: str) -> str | None:
    """The file that a list calls `name`, which may leave out the suffix; None where there is none."""
    for suffix in ("", *_SUFFIXES):
        if (folder / (name + suffix)).is_file():
            return name + suffix
    return None


def _other_splits(path: Path) -> list[Path]:
    """Lists beside this one that are called as it is, but for the name of the split."""
    words = re.split(r"([A-Za-z]+)", path.stem)
    own = [place for place, word in enumerate(words) if word.lower() in SPLIT_NAMES]
    found = []
    for place in own:
        for split in sorted(SPLIT_NAMES - {words[place].lower()}):
            other = path.with_name("".join([*words[:place], split, *words[place + 1 :]]) + path.suffix)
            found += [other] if other.is_file() else []
    return found
