"""A split whose pictures lie side by side, as ImageNet's validation pictures do, and the list that classes them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from alitok_fast.data.labels import NOTHING, ClassFile, is_number, read_class_names, read_list
from alitok_fast.data.left_out import OUT_OF_RANGE, UNLISTED, Reason
from alitok_fast.data.optional import optional
from alitok_fast.storage.text import first_line, shown

SYNSETS = "LOC_synset_mapping.txt"
_LISTS = (
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
    "imagenet_2012_validation_synset_labels.txt",
)
_DEVKIT = Path("ILSVRC2012_devkit_t12") / "data"
_KAGGLE = Path("ILSVRC") / "Data" / "CLS-LOC"


def imagenet_folder(root: Path) -> Path:
    """The folder with the splits, where `root` is what Kaggle's archive of ImageNet unpacks to; else `root`."""
    return root / _KAGGLE if (root / _KAGGLE).is_dir() else root


def synset_names(root: Path) -> ClassFile | None:
    """Names of ImageNet's classes, from the mapping that lies with the data, if one does."""
    found = [place / SYNSETS for place in _places(root) if (place / SYNSETS).is_file()]
    return read_class_names(found[0]) if found else None


def flat_labels(
    root: Path, folder: Path, files: list[str], classes: list[str], path: Path | None
) -> tuple[np.ndarray, dict[Reason, np.ndarray], str]:
    """The labels (len(files),) of the pictures in `folder`, by the list at `path`, or by one that lies with the data.

    The list has a line for each picture, with its name or in the order of the names, and the class: a name in
    `classes`, its number among them from 0 on, or, in the order of the names, the devkit's number from 1 on, which its
    file meta.mat explains. Also gives, for each reason, which pictures (len(files),) the list gives no class, and the
    list's name.
    """
    path = path or _find(root, folder)
    entries = read_list(path)
    if all(not name for name, _ in entries):
        if len(entries) != len(files):
            raise ValueError(f"{path}: expected {len(files)} lines, one per picture in {folder}, got {len(entries)}")
        labels = dict(zip(map(_stem, files), (label for _, label in entries), strict=True))
    else:
        labels = {_stem(name): label for name, label in entries}
    order = {name: number for number, name in enumerate(classes)}
    if all(map(is_number, labels.values())):
        order = _numbered(path, [int(label) for label in labels.values()], classes, in_order=not entries[0][0])
    numbers = np.array([_number(labels.get(_stem(name)), order) for name in files], np.int64)
    wrong = {UNLISTED: numbers == NOTHING, OUT_OF_RANGE: numbers < NOTHING}
    if wrong[UNLISTED].all():
        raise ValueError(f"{path}: expected a line for pictures such as {shown(files[0])!r}, got none for any of them")
    return np.maximum(numbers, 0), wrong, path.name


def _number(label: str | None, order: dict[str, int]) -> int:
    return NOTHING if label is None else order.get(str(int(label)) if is_number(label) else label, NOTHING - 1)


def _numbered(path: Path, numbers: list[int], classes: list[str], in_order: bool) -> dict[str, int]:
    """What the numbers in a list stand for: label by number."""
    if min(numbers) != 1 or max(numbers) != len(classes):
        return {str(number): number for number in range(len(classes))}
    wnids = _devkit_wnids(path.with_name("meta.mat")) if in_order else None
    if wnids is None:
        raise ValueError(
            f"{path}: expected numbers from 0 to {len(classes) - 1}, in the order of the class folders, got 1 to "
            f"{len(classes)}; the devkit's numbers are in another order and need its meta.mat beside the list"
        )
    labels = {name: number for number, name in enumerate(classes)}
    return {number: labels[wnid] for number, wnid in wnids.items() if wnid in labels}


def _devkit_wnids(path: Path) -> dict[str, str] | None:
    """The wnid of each number of ImageNet's development kit; None without its meta.mat."""
    if not path.is_file():
        return None
    loadmat = optional("scipy.io", str(path)).loadmat
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {str(int(one["ILSVRC2012_ID"])): str(one["WNID"]) for one in synsets if int(one["num_children"]) == 0}
    except Exception as error:  # scipy raises nearly anything on damaged files
        raise ValueError(f"{path}: expected the meta.mat of ImageNet's devkit, got {first_line(error)}") from error


def _find(root: Path, folder: Path) -> Path:
    names = (f"{folder.name}.txt", f"{folder.name}.csv", *_LISTS)
    for place in (*_places(root), folder):
        for name in names:
            if (place / name).is_file():
                return place / name
    raise ValueError(
        f"labels: expected class folders in {folder}, as in the other splits, or a list of the classes of its pictures "
        f"({', '.join(names)} in {root}, or another one by name), got neither"
    )


def _places(root: Path) -> list[Path]:
    """Where lists lie: with the splits, in the devkit, or at the top of Kaggle's archive."""
    kaggle = [root.parents[2]] if root.parts[-3:] == _KAGGLE.parts and len(root.parents) > 3 else []
    return [root, root / _DEVKIT, *kaggle]


def _stem(name: str) -> str:
    """A picture's name without folders and suffix, which lists may leave out."""
    return os.path.splitext(os.path.basename(name))[0]
