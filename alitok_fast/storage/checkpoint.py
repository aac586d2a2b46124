"""Models on disk: our own folders (config.json + model.safetensors), and files in the released format.

A file x.pth that we write has x.pth.json beside it, which holds what config.json holds in a folder: configuration,
class names, provenance. Where it is there, it is read with the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from alitok_fast.config import GeneratorConfig, TokenizerConfig
from alitok_fast.storage.files import read_json, write_atomically
from alitok_fast.storage.recognise import Config, check_sizes, recognise
from alitok_fast.storage.state_dict import AVERAGE, State, check_weights, plain_names, unwrap
from alitok_fast.storage.tensor_files import SUFFIXES, check_loaded, read_metadata, read_tensors, separate
from alitok_fast.storage.text import first_line, shown

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT, VERSION = "alitok_fast", 2
METADATA = {"written_by": "alitok_fast"}
"""In the header of each .safetensors that we write. One entry: safetensors writes several in an order of chance."""
LARGEST_DESCRIPTION = 2**26  # bytes

_CONFIGS: dict[str, type[TokenizerConfig] | type[GeneratorConfig]] = {
    "tokenizer": TokenizerConfig,
    "generator": GeneratorConfig,
}


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration, weights (released key names), where they come from, and the file, for messages."""

    config: Config
    state: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)
    path: str = "checkpoint"

    @property
    def kind(self) -> str:
        return "tokenizer" if isinstance(self.config, TokenizerConfig) else "generator"


def read_checkpoint(path: str | os.PathLike, config: Config | None = None, weights: str = "ema") -> Checkpoint:
    """Read one of our folders, or a file in the released format.

    A file's model size and stage are recognised from its shapes, unless x.pth.json of ours lies beside x.pth; `config`
    overrides both, for sizes no preset has. Where a file holds both a moving average of the weights and the weights
    themselves, `weights` "ema" takes the average, and provenance says so; "raw" takes the others.
    Raises FileNotFoundError, or ValueError naming the file, what was expected and what it holds.
    """
    check_weights(weights)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a checkpoint file or folder, got {path}, which does not exist")
    if path.is_dir():
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (path / name).is_file():
                raise ValueError(
                    f"path: expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, got {path} without {name}"
                )
        file, described_by = path / WEIGHTS_NAME, path / CONFIG_NAME
        stored: Config | None
        stored, provenance = _parse(described_by, _read_description(described_by))
    else:
        file, described_by = path, beside(path)
        stored, provenance = _read_beside(path)
    if config is None:
        config, told_by = stored, str(described_by)
    else:
        told_by = "config"
    if weights == "raw" and provenance.get("weights") == AVERAGE:
        raise ValueError(f"{described_by}: expected raw weights, got a moving average alone; take weights='ema'")
    state, average = _read_state(file, weights, config, told_by)
    if config is None:
        config = recognise(state, str(file))
    if stored is None:
        provenance = {"source": path.name}
    if average is not None:
        provenance = {**provenance, "weights": AVERAGE, "weights_key": average}
    return Checkpoint(config, state, provenance, str(file))


def read_state(path: Path, weights: str = "ema") -> dict[str, Tensor]:
    """The tensors of one file, by their released names; `.safetensors`, `.pth`, `.pt` or `.bin`."""
    return _read_state(path, weights).tensors


def write_checkpoint(folder: str | os.PathLike, checkpoint: Checkpoint, force: bool = False) -> Path:
    """Write config.json + model.safetensors; each file appears whole or not at all. Returns the folder.

    Raises ValueError where that would write over files that are no model of ours, unless `force`.
    """
    folder = Path(folder)
    if not force:
        check_target(folder, True)
    tensors = separate(plain_names(checkpoint.state))
    text = _description(checkpoint, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    # Weights first: a folder with a config always has the weights it speaks of.
    write_atomically(folder / WEIGHTS_NAME, lambda temporary: _save_tensors(tensors, temporary))
    write_atomically(folder / CONFIG_NAME, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return folder


def write_file(path: str | os.PathLike, checkpoint: Checkpoint, force: bool = False) -> Path:
    """Write one file in the released format and, as PATH.json, what the format has no place for. Returns the file.

    Raises as `write_checkpoint` does.
    """
    path = Path(path)
    if not force:
        check_target(path, False)
    _description(checkpoint, checkpoint.state)  # raises where it cannot be written, before anything is
    write_released(path, checkpoint.state)
    text = _description(checkpoint, checkpoint.state, bytes=path.stat().st_size)
    write_atomically(beside(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def write_released(path: str | os.PathLike, state: Mapping[str, Tensor]) -> Path:
    """Write one file in the released format, whole or not at all; its suffix chooses safetensors or pickle."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: expected a file ending in one of {', '.join(SUFFIXES)}, got {path.name}")
    tensors = separate(plain_names(state))
    write_atomically(path, lambda file: (_save_tensors if path.suffix == ".safetensors" else torch.save)(tensors, file))
    return path


def beside(path: Path) -> Path:
    """Where the description of a file lies: under its whole name, since x.json might be another file's."""
    return path.with_name(path.name + ".json")


def check_target(path: Path, folder: bool) -> None:
    """ValueError where a model written to `path`, a folder or a file, would replace what is no model of ours."""
    described_by = path / CONFIG_NAME if folder else beside(path)
    weights = path / WEIGHTS_NAME if folder else path
    taken = [file for file in (described_by, weights) if os.path.lexists(file)]
    # Weights alone are ours where a writer was killed before it wrote what describes them.
    ours = _is_ours(described_by) if described_by in taken else read_metadata(weights) == METADATA
    if taken and not ours:
        raise ValueError(
            f"target: expected a new name, or a model that alitok_fast wrote, got {path}, where {taken[0].name} is "
            "there already; force writes over it"
        )


def _is_ours(described_by: Path) -> bool:
    try:
        return read_json(described_by).get("format") == FORMAT
    except (ValueError, OSError):
        return False


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file(dict(tensors), path, METADATA)


def _description(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], **more: Any) -> str:
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "kind": checkpoint.kind,
        "config": checkpoint.config.to_dict(),
        "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
        "provenance": checkpoint.provenance,
        **more,
    }
    try:
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"
        _check_provenance(checkpoint.provenance, checkpoint.config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"provenance: expected values that JSON holds, got {first_line(error)}") from None
    return text


def _read_state(path: Path, weights: str, config: Config | None = None, told_by: str = "") -> State:
    def check(entries: Mapping[str, Any]) -> None:
        if config is not None:
            check_sizes(config, plain_names(entries, str(path)), str(path), told_by)

    state = unwrap(read_tensors(path, check), path, weights)
    check_loaded(state.tensors, path)
    check(state.tensors)
    return State(separate(state.tensors), state.key)


def _read_beside(path: Path) -> tuple[Config | None, dict[str, Any]]:
    """What PATH.json of ours says about a file; nothing where there is none, or another program's."""
    file = beside(path)
    if not file.is_file():
        return None, {}
    description = read_json(file, "JSON, as alitok_fast writes it beside a model")
    if description.get("format") != FORMAT:
        return None, {}
    size = path.stat().st_size
    if description.get("bytes") != size:
        raise ValueError(
            f"{file}: expected the description of {path.name}, {size} bytes, got one of a file of "
            f"{shown(description.get('bytes'))} bytes; remove it if the model has been replaced"
        )
    return _parse(file, description)


def _read_description(file: Path) -> dict[str, Any]:
    if file.stat().st_size > LARGEST_DESCRIPTION:
        raise ValueError(f"{file}: expected at most {LARGEST_DESCRIPTION} bytes, got {file.stat().st_size}")
    description = read_json(file)
    if description.get("format") != FORMAT:
        raise ValueError(f'{file}: expected "format": "{FORMAT}", got a file without it')
    return description


def _parse(file: Path, description: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Configuration and provenance of a description. Raises ValueError naming the file and the key at fault."""
    try:
        version, kind, fields = (description.get(key) for key in ("version", "kind", "config"))
        if version not in (None, 1, VERSION) or isinstance(version, bool):
            newer = isinstance(version, int) and version > VERSION
            advice = "; a newer alitok_fast wrote it: update this one" if newer else ""
            raise ValueError(f"version: expected at most {VERSION}, got {shown(version)}{advice}")
        if not isinstance(kind, str) or kind not in _CONFIGS:
            raise ValueError(f"kind: expected one of {list(_CONFIGS)}, got {shown(repr(kind))}")
        if not isinstance(fields, dict):
            raise ValueError(f"config: expected a dictionary, got {shown(fields)}")
        config = _CONFIGS[kind].from_dict(fields if version == VERSION else _from_first_version(fields))
        provenance = description.get("provenance", {})
        _check_provenance(provenance, config)
        return config, provenance
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: {first_line(error)}") from None


def _check_provenance(provenance: Any, config: Config) -> None:
    """ValueError naming the key where a value that is used later has another type, or cannot be written again."""
    if not isinstance(provenance, dict):
        raise ValueError(f"provenance: expected a dictionary, got {shown(provenance)}")
    try:
        json.dumps(provenance, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("provenance: expected text, got half of a surrogate pair") from None
    except ValueError:
        raise ValueError("provenance: expected finite numbers, got NaN or infinity") from None
    names = provenance.get("classes")
    if names is not None:
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"provenance.classes: expected a list of names, got {shown(names)}")
        if isinstance(config, GeneratorConfig) and len(names) > config.num_classes:
            raise ValueError(f"provenance.classes: expected at most {config.num_classes} names, got {len(names)}")
    for key in ("tokenizer", "weights"):
        if not isinstance(provenance.get(key), str | None):
            raise ValueError(f"provenance.{key}: expected text, got {shown(provenance[key])}")


def _from_first_version(fields: dict[str, Any]) -> dict[str, Any]:
    """A configuration as alitok_fast 0.1 wrote it, under today's names."""
    renamed = {name: f"num_{name}" for name in ("layers", "heads", "classes", "buffer_tokens")}
    return {renamed.get(name, name): value for name, value in fields.items() if name != "seed"}
