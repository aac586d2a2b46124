"""Labels by name: compared exactly first, then in any case and Unicode form, never guessed between two classes."""

from __future__ import annotations

import difflib
import functools
import operator
import unicodedata
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np
from torch import Tensor

from alitok_fast.models.loading import open_checkpoint
from alitok_fast.storage.text import shown

Label = int | str
CANDIDATES = 8  # that an error lists


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """The names of ImageNet-1k's 1,000 classes, in the order of their numbers."""
    text = (resources.files("alitok_fast") / "weights" / "imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def class_names_of(model: str) -> ClassNames:
    """The classes of the generator that `model` names, as for `Pipeline.from_pretrained`; "imagenet" needs no model."""
    if model == "imagenet":
        return ClassNames(imagenet_class_names(), len(imagenet_class_names()))
    opened = open_checkpoint("generator", model)
    return trained_classes(opened.provenance.get("classes"), opened.config)


def trained_classes(names: Sequence[str] | None, config: Any) -> ClassNames:
    """The classes of a checkpoint: by its own names, by ImageNet's where it has 1,000 without names."""
    if names is None and config.num_classes == len(imagenet_class_names()):
        names = imagenet_class_names()
    return ClassNames(names, config.num_classes)


class ClassNames:
    """The classes that a generator was trained on: `num_classes` numbers, with a name for each of them or without.

    Raises TypeError or ValueError for names that are not strings, or more than there are classes.
    """

    def __init__(self, names: Sequence[str] | None, num_classes: int) -> None:
        names = () if names is None else tuple(names)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"class_names: expected strings, got {shown(repr(name))}")
        if len(names) > num_classes:
            raise ValueError(f"class_names: expected at most {num_classes}, one per class, got {len(names)}")
        self.names = names
        self.num_classes = len(names) or num_classes

    def __len__(self) -> int:
        return self.num_classes

    def __iter__(self) -> Iterator[str]:
        return (self[label] for label in range(self.num_classes))

    def __getitem__(self, label: int) -> str:
        """The class's name, or its number where it has none."""
        if not -self.num_classes <= label < self.num_classes:
            raise IndexError(label)
        return self.names[label] if self.names else str(range(self.num_classes)[label])

    def ids(self, labels: Label | Sequence[Label] | Tensor | np.ndarray) -> list[int]:
        """Class numbers of labels given by number or by name, one or several.

        Raises TypeError, or ValueError naming the label: one that no class has, with names that are close, or a
        name that several classes share, with their numbers.
        """
        return [self._id(label) for label in _flat(labels)]

    def _id(self, label: Any) -> int:
        if isinstance(label, str):
            return self._named(label)
        try:
            if isinstance(label, (bool, np.bool_)):
                raise TypeError
            number = operator.index(label)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"labels: expected integers or names, got {shown(repr(label))}") from None
        if not 0 <= number < self.num_classes:
            raise ValueError(f"labels: expected values in [0, {self.num_classes}), got {number}")
        return number

    def _named(self, label: str) -> int:
        wanted = _normal(label)
        for same in (lambda name: name == label, lambda name: _normal(name) == wanted):
            found = [number for number, name in enumerate(self.names) if same(name)]
            if len(found) == 1:
                return found[0]
            if found:
                candidates = ", ".join(f"{number} ({shown(self.names[number])})" for number in found[:CANDIDATES])
                raise ValueError(
                    f"labels: expected a name of one class, got {shown(label)!r}, the name of {candidates}"
                )
        try:
            number = int(label)
        except ValueError:
            raise ValueError(f"labels: expected {self._expected(wanted)}, got {shown(label)!r}") from None
        return self._id(number)

    def _expected(self, wanted: str) -> str:
        numbers = f"a number in 0..{self.num_classes - 1}"
        if not self.names:
            return f"{numbers} (this model has no class names)"
        by_form = {_normal(name): name for name in reversed(self.names)}
        holding = [name for form, name in by_form.items() if wanted and wanted in form]
        close = [by_form[form] for form in difflib.get_close_matches(wanted, by_form, CANDIDATES)]
        candidates = list(dict.fromkeys([*holding, *close]))[:CANDIDATES] or self.names[:CANDIDATES]
        more = "" if len(candidates) == len(self.names) else ", ..."
        return f"{numbers} or a class name, such as {', '.join(map(shown, candidates))}{more}"


def _flat(labels: Any) -> Iterator[Any]:
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    if isinstance(labels, (str, bytes)) or not hasattr(labels, "__iter__"):
        labels = [labels]
    for label in labels:
        yield label.item() if isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0 else label


def _normal(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
