"""Folders of pictures: which files are data, which class and which split they belong to, and what is left out."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alitok_fast.data.checks import require_choice
from alitok_fast.data.encoded import PictureFiles
from alitok_fast.data.flat_split import flat_labels
from alitok_fast.data.labels import ClassFile
from alitok_fast.data.left_out import (
    EMPTY,
    HIDDEN,
    LOOSE,
    OTHER_FILES,
    OTHER_SPLITS,
    SPLIT_NAMES,
    TWICE,
    LeftOut,
    Reason,
    is_junk,
)
from alitok_fast.data.pictures import picture_suffixes


class FolderImages(PictureFiles):
    """A folder of pictures; its sub-folders, sorted by name, are the classes. Without sub-folders: one class.

    Where the folder holds splits (train/, val/, ...), `split` chooses one, and a class has the same label in all of
    them. ValueError lists the splits where that one is missing. A split without class folders beside ones that have
    them (ImageNet's validation pictures) has its classes from a list: `labels`, or one that data.flat_split finds.
    `classes` gives the classes other names than their folders'. Hidden and system names are never data.

    on_error "stop" raises UnreadableImageError when a bad file is reached. "skip" decodes every file once at the
    start, warns about each bad one by name and leaves it out, so that the data order stays fixed afterwards.
    `reading` (image_size, apply_orientation, convert_profile): as for `read_image`.
    """

    def __init__(
        self,
        folder: str | Path,
        on_error: str = "stop",
        split: str = "train",
        labels: Path | None = None,
        classes: ClassFile | None = None,
        **reading,
    ) -> None:
        require_choice("on_error", on_error, ("stop", "skip"))
        self.root, self.left_out, self._suffixes = Path(folder), LeftOut(), picture_suffixes()
        if not self.root.is_dir():
            raise ValueError(f"data: expected a folder, got {folder}")
        splits = self._splits(split)
        chosen = self.root / split if splits else self.root
        names = sorted({_class_name(group) for part in splits or [self.root] for group in self._groups(part)})
        flat = not names or (bool(splits) and not self._groups(chosen))
        paths = self._flat(chosen) if flat else None
        given = np.zeros(len(paths or []), np.int64)
        wrong: dict[Reason, np.ndarray] = {}
        by = ""
        if paths and names:
            given, wrong, by = flat_labels(self.root, chosen, [path.name for path in paths], names, labels)
        elif labels is not None:
            why = f"folders name the classes in {chosen}" if names else f"{self.root} has no class folders in any split"
            raise ValueError(
                f"labels: expected nothing, since {why}, got {labels}; a list of paths can itself be the data"
            )
        files = self._labelled(chosen, names) if paths is None else list(zip(paths, given, strict=True))
        super().__init__(
            self.root,
            [path.relative_to(self.root).as_posix() for path, _ in files],
            f"{self.root.name}/{split}" if splits else self.root.name,
            classes.renamed(names) if classes and names else names or [self.root.name],
            np.array([label for _, label in files], np.int64),
            self.left_out,
            **reading,
        )
        self.note = f" by {by}" if by else ""
        self.keep_labelled(wrong)
        if on_error == "skip":
            self.drop_unreadable()
        if not len(self):
            left = f" ({self.left_out})" if self.left_out.counts else ""
            raise ValueError(f"data: expected at least one readable image under {chosen}, found none{left}")

    def _splits(self, split: str) -> list[Path]:
        """The folders of the splits; none where the sub-folders are classes."""
        folders = self._folders(self.root)
        alike = [path for path in folders if path.name.lower() in SPLIT_NAMES]
        only_splits = bool(folders) and alike == folders
        chosen = [path for path in folders if path.name == split]
        if chosen and (only_splits or self._folders(chosen[0])):
            others = [path for path in folders if path not in alike and path not in chosen]
            for path in others:
                self.left_out.add(OTHER_SPLITS, path)
            self._beside(self.root, LOOSE)
            return [path for path in folders if path not in others]
        if only_splits or (len(alike) > 1 and all(self._folders(path) for path in alike)):
            names = ", ".join(repr(path.name) for path in alike)
            raise ValueError(f"split: expected one of {names}, the splits in {self.root}, got {split!r}")
        if split != "train":
            raise ValueError(f"split: expected 'train', since {self.root} holds no splits, got {split!r}")
        return []

    def _folders(self, folder: Path) -> list[Path]:
        return [Path(entry) for entry in _entries(folder) if entry.is_dir() and not is_junk(entry.name)]

    def _groups(self, folder: Path) -> list[Path]:
        """The class folders: those that hold a picture."""
        silent = LeftOut()
        return [path for path in self._folders(folder) if next(self._walk(path, silent, set()), None) is not None]

    def _labelled(self, folder: Path, names: list[str]) -> list[tuple[Path, int]]:
        labels, groups = {name: label for label, name in enumerate(names)}, self._groups(folder)
        self._beside(folder, LOOSE)
        for path in self._folders(folder):
            if path not in groups:
                self.left_out.add(EMPTY, path)
        walks = ((group, sorted(self._walk(group, self.left_out, set()))) for group in groups)
        return [(path, labels[_class_name(group)]) for group, paths in walks for path in paths]

    def _flat(self, folder: Path) -> list[Path]:
        for path in self._folders(folder):
            self.left_out.add(EMPTY, path)
        return self._beside(folder)

    def _beside(self, folder: Path, loose: Reason | None = None) -> list[Path]:
        """The pictures in a folder itself, left out where `loose` says why; what is no picture is left out anyway."""
        found = []
        for entry in _entries(folder):
            path = Path(entry)
            if is_junk(entry.name):
                self.left_out.add(HIDDEN, path)
            elif self._is_picture(entry):
                self.left_out.add(loose, path) if loose else found.append(path)
            elif not entry.is_dir():
                self.left_out.add(OTHER_FILES, path)
        return found

    def _walk(self, folder: Path, left_out: LeftOut, seen: set[str]) -> Iterator[Path]:
        """Pictures at any depth; links to folders are followed, and each folder is entered once."""
        seen.add(os.path.realpath(folder))
        for entry in _entries(folder):
            path = Path(entry)
            if is_junk(entry.name):
                left_out.add(HIDDEN, path)
            elif self._is_picture(entry):
                yield path
            elif not entry.is_dir():
                left_out.add(OTHER_FILES, path)
            elif os.path.realpath(path) in seen:
                left_out.add(TWICE, path)
            else:
                yield from self._walk(path, left_out, seen)

    def _is_picture(self, entry: os.DirEntry) -> bool:
        return os.path.splitext(entry.name)[1].lower() in self._suffixes and entry.is_file()


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, by name; their types come with the names, without looking at each file."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _class_name(folder: Path) -> str:
    """One name for what macOS and Linux write as different bytes."""
    return unicodedata.normalize("NFC", folder.name)
