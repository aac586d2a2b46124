"""Where a run's settings come from: presets, run files, --set, and runs of before. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alitok_fast.config import GENERATORS, TOKENIZERS, generator_preset, tokenizer_preset
from alitok_fast.storage.text import first_line, shown
from alitok_fast.storage.toml import read_toml
from alitok_fast.training.config import GENERATOR_PRESETS, TOKENIZER_PRESETS
from alitok_fast.training.run_settings import (
    KINDS,
    PARTS,
    SECTIONS,
    Setting,
    absolute,
    from_text,
    from_toml,
    nearest,
    repr_of,
    settings_of,
    unknown,
    values_of,
)

DEFAULT_PRESET = "demo"


@dataclass(frozen=True)
class Layer:
    """Settings by path from one source, whose name is for messages, with the presets that it begins with."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    presets: dict[str, str] = field(default_factory=dict)

    def shown(self, setting: Setting) -> str:
        """How the source writes a setting: as the start of a message."""
        if self.source == "--set":
            return f"--set {setting.name if setting.part == 'training' else setting.path}"
        return f"{self.source}: {setting.path}" if self.source else setting.name


def read_run_file(path: str | os.PathLike, kind: str) -> Layer:
    """The settings in a run file of a tokenizer's or a generator's run; relative paths in it begin at its folder.

    Raises ValueError in one line that names the file and the key at fault, OSError where it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"config: expected a run file (TOML), got the folder {path}")
    try:
        tables = read_toml(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"config: expected a run file (TOML), got {path}, which does not exist") from None
    values: dict[str, Any] = {}
    presets: dict[str, str] = {}
    for section, table in tables.items():
        if section in ("kind", "preset"):
            _top_level(path, kind, section, table, presets)
        elif section not in SECTIONS:
            raise ValueError(f"{path}: unknown section or key {shown(section)!r}; {_where(kind, section)}")
        elif not isinstance(table, Mapping):
            raise ValueError(f"{path}: {section}: expected a section, [{section}], got {shown(repr_of(table))}")
        else:
            values |= _section(path, kind, section, table, presets)
    return Layer(str(path), values, presets)


def _where(kind: str, name: str) -> str:
    sections = [s.section for s in settings_of(kind).values() if s.name == name]
    return f"{name!r} belongs to [{sections[0]}]" if sections else nearest(name, [*SECTIONS, "kind", "preset"])


def _top_level(path: Path, kind: str, name: str, value: Any, presets: dict[str, str]) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{path}: {name}: expected text, got {shown(repr_of(value))}")
    if name == "kind" and value != kind:
        what = f"{kind!r}, as this command trains" if value in KINDS else f"one of {KINDS}"
        raise ValueError(f"{path}: kind: expected {what}, got {shown(value)!r}")
    if name == "preset":
        for part in ("model", "training"):
            presets.setdefault(part, value)


def _section(path: Path, kind: str, section: str, table: Mapping[str, Any], presets: dict[str, str]) -> dict[str, Any]:
    settings, values = settings_of(kind), {}
    for name, value in table.items():
        if name == "preset" and section in ("model", "training"):
            if not isinstance(value, str):
                raise ValueError(f"{path}: {section}.preset: expected text, got {shown(repr_of(value))}")
            presets[section] = value
            continue
        setting = settings.get(f"{section}.{name}")
        if setting is None:
            raise ValueError(f"{path}: {unknown(kind, section, name)}")
        try:
            value = from_toml(setting, value)
        except ValueError as error:
            raise ValueError(f"{path}: {setting.path}: {error}") from None
        values[setting.path] = absolute(setting, value, path.parent) if setting.is_path and value else value
    return values


def set_layer(kind: str, settings: Sequence[str]) -> Layer:
    """The layer of `--set name=value`: a path such as model.width, or the name alone of a training setting."""
    known, values = settings_of(kind), {}
    bare = {setting.name: path for path, setting in known.items() if setting.part == "training"}
    for given in settings:
        name, equals, text = given.partition("=")
        if not equals:
            raise ValueError(f"--set: expected name=value, got {shown(given)!r}")
        path = bare.get(name, name)
        if path not in known:
            section, _, key = name.rpartition(".")
            why = f"--set: unknown setting {shown(name)!r}; {nearest(name, [*bare, *known])}"
            raise ValueError(f"--set: {unknown(kind, section, key)}" if section in SECTIONS else why)
        setting = known[path]
        try:
            value = from_text(setting, text)
        except ValueError as error:
            raise ValueError(f"--set {name}: {error}") from None
        values[path] = absolute(setting, value, Path.cwd()) if setting.is_path and value else value
    return Layer("--set", values)


def preset_layer(kind: str, presets: Mapping[str, str], stage: int | None = None) -> Layer:
    """All settings of a preset. `presets` names it, for "model" and for "training"; a tokenizer's has two stages."""
    model_name, name = (presets.get(part, DEFAULT_PRESET) for part in ("model", "training"))
    parts = {part: config() for part, config in PARTS[kind].items()}
    training: Mapping[str, Any] = GENERATOR_PRESETS
    if kind == "tokenizer":
        parts["model"], training = (
            replace(tokenizer_preset(model_name), stage=stage or 1),
            TOKENIZER_PRESETS[stage or 1],
        )
    else:
        parts["model"] = generator_preset(model_name)
    if name not in training:
        raise ValueError(f"preset: expected one of {sorted(training)}, got {shown(name)!r}")
    return Layer(f"preset {name}", values_of(kind, {**parts, "training": training[name]}))


def preset_names(kind: str) -> list[str]:
    """The presets of a kind, small before large."""
    return list(TOKENIZERS if kind == "tokenizer" else GENERATORS)


def saved_layer(folder: Path, kind: str, train: Mapping[str, Any], model: Mapping[str, Any]) -> Layer:
    """The settings in config.json of a run that has no run file."""
    file = folder / "config.json"
    try:
        parts: dict[str, Any] = {
            "model": PARTS[kind]["model"].from_dict(dict(model)),
            "training": PARTS[kind]["training"].from_dict(dict(train)),
        }
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {first_line(error)}") from None
    return Layer(str(file), values_of(kind, parts))


def stage_of(layers: Sequence[Layer]) -> int | None:
    """The tokenizer's stage that the last layer which has one says. Raises ValueError for another than 1 or 2."""
    for layer in reversed(layers):
        if (stage := layer.values.get("model.stage")) is not None:
            if stage not in (1, 2):
                raise ValueError(f"{layer.source + ': ' if layer.source else ''}stage: expected 1 or 2, got {stage}")
            return stage
    return None


def presets_of(layers: Sequence[Layer]) -> dict[str, str]:
    """The presets that the layers begin with, by part; the last layer which names one counts."""
    return {part: name for layer in layers for part, name in layer.presets.items()}
