"""What a run's settings are: names, sections, types and paths, as run files and --set write them. Loads no torch."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alitok_fast.config import Config, GeneratorConfig, TokenizerConfig
from alitok_fast.storage.text import shown
from alitok_fast.storage.toml import parse_toml
from alitok_fast.training.config import GeneratorTrainConfig, TokenizerTrainConfig
from alitok_fast.training.phases import Phase

KINDS = ("tokenizer", "generator")
SECTIONS = ("model", "training", "data", "evaluation")
AUTO = "auto"
"""In a run file and after --set, None of a setting that is no text: chosen by the program."""
_WATCHING = {
    "log_every",
    "pictures_every",
    "evaluate_every",
    "evaluate_images",
}  # of the training settings, those in [evaluation]


def _option(default: Any, help: str, *names: str, path: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "names": names, "path": path})


@dataclass(frozen=True)
class PictureData(Config):
    """Where pictures come from: [data] of a tokenizer's run."""

    path: str | None = _option(
        None,
        "Folder of class folders, IDX files or shards; list (.txt, .csv); shards (x-{000..146}.tar); hf:NAME[:SPLIT].",
        "--data",
        path=True,
    )
    split: str = _option("train", "IDX files: train or test. Otherwise a split of the data, such as val.")
    skip_list: str | None = _option(None, "Samples to leave out, by `alitok-fast data check --out`.", path=True)
    root: str | None = _option(None, "Of a list: the folder of its pictures; the list's own, if not given.", path=True)
    labels: str | None = _option(None, "Classes of a split without class folders (ImageNet's val).", path=True)
    class_names: str | None = _option(None, "File that names the classes, one a line, or 'wnid name'.", path=True)
    image_column: str | None = _option(None, "Column (datasets) or suffix (shards) of the pictures.")
    label_column: str | None = _option(None, "Column of the labels; of shards cls, txt, json or json.KEY; 'none'.")
    index_folder: str | None = _option(None, "Where the index of shards is kept; beside them, if not given.", path=True)
    on_error: str = _option("stop", "Unreadable pictures: 'stop' at them, or 'skip' them by name.")
    orientation: bool = _option(True, "Turn pictures as their EXIF data say, as viewers do.")
    profile: bool = _option(True, "Convert the colours of pictures with a colour profile to sRGB.")
    draft: bool = _option(True, "Decode large JPEGs at a reduced size that is enough, which is faster.")
    workers: int | None = _option(None, "Processes that read pictures; one per core, at most 8, if not given.")


@dataclass(frozen=True)
class TokenData(Config):
    """Where tokens come from: [data] of a generator's run."""

    cache: str | None = _option(None, "Token cache written by `alitok-fast tokenize`.", path=True)
    workers: int = _option(0, "Processes that read tokens; with 0 the one that trains does.")


@dataclass(frozen=True)
class TokenizerStart(Config):
    """What a tokenizer begins with: in [model]."""

    stage1: str | None = _option(None, "Stage 2: the stage-1 model to start from.", path=True)
    init: str | None = _option(None, "A tokenizer whose weights to start from.", path=True)


@dataclass(frozen=True)
class GeneratorStart(Config):
    """What a generator begins with: in [model]."""

    init: str | None = _option(None, "A generator whose weights to start from.", path=True)


@dataclass(frozen=True)
class TokenizerWatch(Config):
    """What is shown while a tokenizer trains: in [evaluation], beside `log_every`, `evaluate_every` and the like."""

    tensorboard: bool = _option(False, "Also write TensorBoard files.")
    evaluate_data: str | None = _option(
        None, "Pictures to evaluate with; the held-out split of the run's own data, if not given.", path=True
    )
    evaluate_split: str | None = _option(None, "Split of these; val, validation or test, if not given.")
    evaluate_network: str | None = _option(None, "Network whose features to measure rFID in, such as inception.")
    evaluate_weights: str | None = _option(None, "File of that network's weights.", path=True)


@dataclass(frozen=True)
class GeneratorWatch(Config):
    """What is shown while a generator trains: in [evaluation], beside `log_every`, `evaluate_every` and the like."""

    tensorboard: bool = _option(False, "Also write TensorBoard files.")
    tokenizer: str | None = _option(None, "The tokenizer of the tokens, to show samples as pictures.", path=True)
    reference: str | None = _option(
        None, "Statistics that samples are evaluated against, as for `evaluate samples`.", path=True
    )
    evaluate_weights: str | None = _option(None, "File of the weights of the statistics' network.", path=True)
    evaluate_guidance: float | None = _option(None, "Guidance of these samples; 0 for none, the model's if not given.")


PARTS: dict[str, dict[str, type[Config]]] = {
    "tokenizer": {
        "model": TokenizerConfig,
        "start": TokenizerStart,
        "training": TokenizerTrainConfig,
        "data": PictureData,
        "watch": TokenizerWatch,
    },
    "generator": {
        "model": GeneratorConfig,
        "start": GeneratorStart,
        "training": GeneratorTrainConfig,
        "data": TokenData,
        "watch": GeneratorWatch,
    },
}
_SECTION_OF = {"model": "model", "start": "model", "training": "training", "data": "data", "watch": "evaluation"}
_LARGEST = 2**63
_TRAINING_PATHS = {"perceptual_weights", "lpips_weights"}


@dataclass(frozen=True)
class Setting:
    """One key of a section, such as `lr` of [training]: its part of a run, its type as it is written, its default."""

    part: str
    name: str
    section: str
    type: str
    default: Any
    is_path: bool

    @property
    def path(self) -> str:
        """As --set names it, such as "training.lr"."""
        return f"{self.section}.{self.name}"

    @property
    def has_auto(self) -> bool:
        return self.type.endswith(" | None") and not self.type.startswith("str")

    @property
    def expected(self) -> str:
        kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
        what = kinds.get(self.type.removesuffix(" | None"))
        if what is None:
            what = "a list of phases, each a table" if "Phase" in self.type else "a list of numbers"
        return f'{what} or "{AUTO}"' if self.has_auto else what


def settings_of(kind: str) -> dict[str, Setting]:
    """All settings of a tokenizer's or a generator's run by path, in the order of a run file."""
    found = []
    for part, config in PARTS[kind].items():
        for f in dataclasses.fields(config):
            watching = part == "training" and f.name in _WATCHING
            section = "evaluation" if watching else _SECTION_OF[part]
            is_path = f.metadata.get("path", False) or f.name in _TRAINING_PATHS
            found.append(Setting(part, f.name, section, str(f.type), f.default, is_path))
    found.sort(key=lambda setting: SECTIONS.index(setting.section))
    return {setting.path: setting for setting in found}


def values_of(kind: str, parts: Mapping[str, Config]) -> dict[str, Any]:
    """The settings by path that these parts of a run hold."""
    settings = settings_of(kind).items()
    return {path: getattr(parts[s.part], s.name) for path, s in settings if s.part in parts}


def unknown(kind: str, section: str, name: str) -> str:
    """What to say of a key that a section does not have: the section that has it, or the nearest key."""
    settings = settings_of(kind).values()
    said = [f"it belongs to [{s.section}]" for s in settings if s.name == name]
    said += [nearest(name, [s.name for s in settings if s.section == section])]
    return f"unknown key {shown(name)!r} in [{section}]; {said[0]}"


def nearest(name: str, known: Sequence[str]) -> str:
    """The nearest of the names there are, or all of them."""
    near = difflib.get_close_matches(name, known, 1)
    return f"the nearest is {near[0]!r}" if near else f"expected one of {', '.join(known)}"


def from_toml(setting: Setting, value: Any) -> Any:
    """A setting's value out of a TOML file; ValueError says what was expected and what came."""
    base = setting.type.removesuffix(" | None")
    if setting.has_auto and value == AUTO:
        return None
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise ValueError(f"expected {setting.expected}, got a number of more than 64 bits")
    if base == "float" and type(value) in (int, float):
        return float(value)
    if base in ("int", "bool", "str") and type(value).__name__ == base:
        return value
    if base.startswith("tuple") and isinstance(value, list):
        if "Phase" in base:
            return tuple(_phase(number, table) for number, table in enumerate(value, start=1))
        if all(type(one) in (int, float) and abs(one) < _LARGEST for one in value):
            return tuple(map(float, value))
    raise ValueError(f"expected {setting.expected}, got {shown(repr_of(value))}")


def _phase(number: int, table: Any) -> Phase:
    """Phase `number` of a list. Its own settings are checked here, so that the number is in the message."""
    if not isinstance(table, Mapping):
        raise ValueError(f"expected a list of phases, each a table, got {shown(repr_of(table))} as number {number}")
    fields = {f.name: f for f in dataclasses.fields(Phase)}
    values = {}
    for name, value in table.items():
        if name not in fields:
            raise ValueError(f"phase {number}: unknown key {shown(name)!r}; {nearest(name, list(fields))}")
        f = fields[name]
        setting = Setting("phases", name, "training.phases", str(f.type), f.default, False)
        try:
            values[name] = from_toml(setting, value)
        except ValueError as error:
            raise ValueError(f"phase {number}: {name}: {error}") from None
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ValueError(f"phase {number}: expected {' and '.join(missing)}, got none")
    try:
        return Phase(**values)
    except ValueError as error:
        raise ValueError(f"phase {number}: {str(error).removeprefix('phase.')}") from None


def from_text(setting: Setting, text: str) -> Any:
    """A setting's value out of `--set name=text`; ValueError says what was expected and what came."""
    base = setting.type.removesuffix(" | None")
    if base == "str":
        return text
    if setting.has_auto and text.lower() in (AUTO, "none"):
        return None
    try:
        if base == "int":
            return int(text)
        if base == "float":
            return float(text)
        if base == "bool":
            return {"true": True, "false": False}[text.strip().lower()]
        if "Phase" not in base:  # 0.9,0.95 with or without brackets
            return tuple(float(part) for part in text.strip().strip("()[]").split(","))
    except (ValueError, KeyError):
        raise ValueError(f"expected {setting.expected}{_example(setting)}, got {shown(text)!r}") from None
    return from_toml(setting, parse_toml(f"value = {text}")["value"])


def _example(setting: Setting) -> str:
    default = setting.default
    if default is None or isinstance(default, bool):
        return ""
    return " such as " + (",".join(map(str, default)) if isinstance(default, tuple) else str(default))


def repr_of(value: Any) -> str:
    """A value as text in quotes, a table or a list by its kind: nothing that is deep."""
    if isinstance(value, Mapping):
        return "a table"
    return "a list" if isinstance(value, list) else repr(value)


def absolute(setting: Setting, value: str, folder: Path) -> str:
    """A path out of a file in `folder`, from anywhere. Names that are no paths ("demo", "hf:NAME", a repository of the
    hub) stay as they are."""
    if not value or re.match(r"[A-Za-z][\w+.-]+:", value):
        return value
    there = os.path.abspath(os.path.join(folder, os.path.expanduser(value)))
    is_model = setting.name in ("init", "stage1", "tokenizer")
    return value if is_model and not os.path.exists(there) else there
