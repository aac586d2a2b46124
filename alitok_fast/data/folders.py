"""Folders of pictures: which files are data, which class and which split they belong to, and what is left out."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from alitok_fast.data.checks import require_choice, require_count
from alitok_fast.data.pictures import PixelGate, UnreadableImageError, check_image, picture_suffixes, read_image
from alitok_fast.storage.text import shown

_log = logging.getLogger(__name__)

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"})
_SYSTEM_NAMES = frozenset(
    {"__macosx", "__pycache__", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information",
     "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)  # fmt: skip
Reason = tuple[str, str]  # for one thing, for several
HIDDEN: Reason = ("hidden or system name", "hidden or system names")
OTHER_FILES: Reason = ("file of another kind", "files of other kinds")
LOOSE: Reason = ("picture beside the class folders", "pictures beside the class folders")
EMPTY: Reason = ("folder without pictures", "folders without pictures")
OTHER_SPLITS: Reason = ("folder that is no split", "folders that are no split")
TWICE: Reason = ("link to a folder that was read already", "links to folders that were read already")
UNREADABLE: Reason = ("unreadable picture", "unreadable pictures")
_SAMPLED_FILES, _SAMPLED_BYTES = 64, 1 << 20


class LeftOut:
    """How many things were left out, for each reason, with the first one as an example."""

    def __init__(self) -> None:
        self.counts: dict[Reason, int] = {}
        self._examples: dict[Reason, str] = {}

    def add(self, reason: Reason, path: Path) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self._examples.setdefault(reason, path.name)

    def __str__(self) -> str:
        return ", ".join(
            f"{n:,} {reason[n > 1]} (such as '{shown(self._examples[reason])}')" for reason, n in self.counts.items()
        )


class FolderImages:
    """A folder of pictures; its sub-folders, sorted by name, are the classes. Without sub-folders: one class.

    Where the folder holds splits (train/, val/, ...), `split` chooses one, and a class has the same label in all of
    them. ValueError lists the splits where that one is missing. Hidden and system names are never data. `left_out`
    and `summary` say what was found and what was not taken.

    on_error "stop" raises UnreadableImageError when a bad file is reached. "skip" decodes every file once at the
    start, warns about each bad one by name and leaves it out, so that the data order stays fixed afterwards.
    `image_size`, `apply_orientation` and `convert_profile`: as for `read_image`.
    """

    def __init__(
        self,
        folder: str | Path,
        on_error: str = "stop",
        split: str = "train",
        image_size: int | None = None,
        apply_orientation: bool = True,
        convert_profile: bool = True,
    ) -> None:
        require_choice("on_error", on_error, ("stop", "skip"))
        if image_size is not None:
            require_count("image_size", image_size)
        self.root = Path(folder)
        if not self.root.is_dir():
            raise ValueError(f"data: expected a folder, got {folder}")
        self._reading = {"apply_orientation": apply_orientation, "convert_profile": convert_profile}
        self._image_size, self._gate = image_size, PixelGate()
        self.left_out, self._suffixes = LeftOut(), picture_suffixes()
        splits = self._splits(split)
        chosen = self.root / split if splits else self.root
        self.name = f"{self.root.name}/{split}" if splits else self.root.name
        names = {_class_name(group) for part in splits or [self.root] for group in self._groups(part)}
        self.class_names = sorted(names) or [self.root.name]
        files = self._labelled(chosen) if names else [(path, 0) for path in self._flat(chosen)]
        if on_error == "skip":
            files = self._readable(files)
        if not files:
            left = f" ({self.left_out})" if self.left_out.counts else ""
            raise ValueError(f"data: expected at least one readable image under {chosen}, found none{left}")
        self.paths = [path for path, _ in files]
        self.labels = np.array([label for _, label in files], np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> np.ndarray:
        return read_image(self.paths[index], image_size=self._image_size, gate=self._gate, **self._reading)

    def fingerprint(self) -> str:
        """A short hash of the files' names, sizes and classes, of how they are read, and of up to 64 files' bytes."""
        digest = hashlib.sha256(repr((sorted(self._reading.items()), self._image_size, self.class_names)).encode())
        for path, label in zip(self.paths, self.labels, strict=True):
            entry = (path.relative_to(self.root).as_posix(), path.stat().st_size, int(label))
            digest.update(repr(entry).encode("utf-8", "surrogateescape"))
        for path in self.paths[:: -(-len(self.paths) // _SAMPLED_FILES)]:
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLED_BYTES))
        return digest.hexdigest()[:16]

    @property
    def summary(self) -> str:
        """What was found and what was left out, in one line."""
        held, classes = len(np.unique(self.labels)), len(self.class_names)
        of = f"{held} of {classes} classes" if held < classes else f"{classes} {'class' if classes == 1 else 'classes'}"
        left = f"; left out: {self.left_out}" if self.left_out.counts else ""
        pictures = "picture" if len(self) == 1 else "pictures"
        return f"{shown(self.name)}: {len(self):,} {pictures} in {of}{left}"

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
        return [Path(entry) for entry in _entries(folder) if entry.is_dir() and not _is_junk(entry.name)]

    def _groups(self, folder: Path) -> list[Path]:
        """The class folders: those that hold a picture."""
        silent = LeftOut()
        return [path for path in self._folders(folder) if next(self._walk(path, silent, set()), None) is not None]

    def _labelled(self, folder: Path) -> list[tuple[Path, int]]:
        labels, groups = {name: label for label, name in enumerate(self.class_names)}, self._groups(folder)
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
            if _is_junk(entry.name):
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
            if _is_junk(entry.name):
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

    def _readable(self, files: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
        def problem(entry: tuple[Path, int]) -> str | None:
            try:
                check_image(entry[0], self._gate)
            except UnreadableImageError as error:
                return str(error)
            return None

        with ThreadPoolExecutor() as pool:
            problems = list(pool.map(problem, files))
        for (path, _), text in zip(files, problems, strict=True):
            if text is not None:
                self.left_out.add(UNREADABLE, path)
                _log.warning("skipped %s", text)
        return [entry for entry, text in zip(files, problems, strict=True) if text is None]


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, by name; their types come with the names, without looking at each file."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _class_name(folder: Path) -> str:
    """One name for what macOS and Linux write as different bytes."""
    return unicodedata.normalize("NFC", folder.name)
