"""Weights on disk: files in the released format, and our own folders (config.json + model.safetensors).

Everything read here is data. Pickles are opened with `weights_only=True`, so a file that would run code is refused.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alitok_fast.config import GENERATORS, TOKENIZERS, GeneratorConfig, TokenizerConfig
from alitok_fast.storage.files import first_line, write_atomically

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT, VERSION = "alitok_fast", 2
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

Config = TokenizerConfig | GeneratorConfig
_CONFIGS: dict[str, type] = {"tokenizer": TokenizerConfig, "generator": GeneratorConfig}


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration, weights (released key names) and where they come from."""

    config: Config
    state: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "tokenizer" if isinstance(self.config, TokenizerConfig) else "generator"


def read_checkpoint(path: str | os.PathLike, config: Config | None = None) -> Checkpoint:
    """Read one of our folders, or a file in the released format.

    A file's model size and stage are recognised from its shapes; `config` overrides that, for sizes no preset has.
    Raises FileNotFoundError, or ValueError naming the file, what was expected and what it holds.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a checkpoint file or folder, got {path}, which does not exist")
    if path.is_dir():
        return _read_folder(path, config)
    state = read_state(path)
    recognised = config or recognise(state, str(path))
    return Checkpoint(recognised, state, {"source": path.name})


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by their released names; `.safetensors`, `.pth`, `.pt` or `.bin`."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: expected a file ending in one of {', '.join(SUFFIXES)}, got {path.name}")
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected a plain dictionary of tensors, got a pickle that needs code to run, or a damaged one; "
            f"refused, nothing was executed ({first_line(error)})"
        ) from None
    except PermissionError:
        raise
    except Exception as error:  # fed garbage, the unpickler raises nearly anything: KeyError, UnicodeDecodeError, ...
        raise ValueError(
            f"{path}: expected a complete {path.suffix} checkpoint, got a truncated or foreign file of "
            f"{path.stat().st_size} bytes ({first_line(error)})"
        ) from None
    return _unwrap(loaded, path)


def recognise(state: Mapping[str, Tensor], source: str = "state") -> Config:
    """The configuration whose model has these tensors: presets first, then what the shapes say."""
    if "encoder.patch_embed.weight" in state:
        return _recognise_tokenizer(state, source)
    if "embeddings.weight" in state:
        return _recognise_generator(state, source)
    sample = ", ".join(list(state)[:3]) or "nothing"
    raise ValueError(f"{source}: expected an AliTok tokenizer or generator, got tensors named {sample}, ...")


def write_checkpoint(folder: str | os.PathLike, checkpoint: Checkpoint) -> Path:
    """Write config.json + model.safetensors; each file appears whole or not at all. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.state.items()}
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "kind": checkpoint.kind,
        "config": checkpoint.config.to_dict(),
        "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
        "provenance": checkpoint.provenance,
    }
    # Weights first: a folder with a config always has the weights it speaks of.
    write_atomically(folder / WEIGHTS_NAME, lambda temporary: save_file(tensors, temporary))
    text = json.dumps(description, indent=2) + "\n"
    write_atomically(folder / CONFIG_NAME, lambda temporary: temporary.write_text(text))
    return folder


def write_released(path: str | os.PathLike, state: Mapping[str, Tensor]) -> Path:
    """Write one file in the released format, whole or not at all; its suffix chooses safetensors or pickle."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: expected a file ending in one of {', '.join(SUFFIXES)}, got {path.name}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(path, lambda file: (save_file if path.suffix == ".safetensors" else torch.save)(tensors, file))
    return path


def _read_folder(folder: Path, config: Config | None) -> Checkpoint:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"path: expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, got {folder} without {name}"
            )
    try:
        description = json.loads((folder / CONFIG_NAME).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: expected JSON, got {first_line(error)}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f'{folder / CONFIG_NAME}: expected "format": "{FORMAT}", got a file without it')
    if description.get("kind") not in _CONFIGS:
        raise ValueError(
            f"{folder / CONFIG_NAME}: kind: expected one of {list(_CONFIGS)}, got {description.get('kind')!r}"
        )
    if not isinstance(description.get("config"), dict):
        raise ValueError(f"{folder / CONFIG_NAME}: config: expected a dictionary, got {description.get('config')!r}")
    fields = description["config"] if "version" in description else _from_first_version(description["config"])
    stored = _CONFIGS[description["kind"]].from_dict(fields)
    return Checkpoint(config or stored, read_state(folder / WEIGHTS_NAME), description.get("provenance", {}))


def _from_first_version(fields: dict[str, Any]) -> dict[str, Any]:
    """A configuration as alitok_fast 0.1 wrote it, under today's names."""
    renamed = {name: f"num_{name}" for name in ("layers", "heads", "classes", "buffer_tokens")}
    return {renamed.get(name, name): value for name, value in fields.items() if name != "seed"}


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict itself, out of the wrappers that training scripts put around it."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(loaded).__name__}")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Layers whose names match `pattern`, which has one group for the layer's number."""
    numbers = {int(m.group(1)) for name in state if (m := re.match(pattern, name))}
    return len(numbers)


def _shape(state: Mapping[str, Tensor], source: str, name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that tells the model's size."""
    shape = tuple(state[name].shape) if name in state else None
    if shape is None or len(shape) != ndim or 0 in shape:
        found = "no such tensor" if shape is None else f"shape {shape}"
        raise ValueError(f"{source}: {name}: expected a tensor of {ndim} dimensions, got {found}")
    return shape


def _recognise_tokenizer(state: Mapping[str, Tensor], source: str) -> TokenizerConfig:
    encoder_width, _, _, patch = _shape(state, source, "encoder.patch_embed.weight", 4)
    patches, _ = _shape(state, source, "encoder.positional_embedding", 2)
    decoder_width, _ = _shape(state, source, "decoder.decoder_embed.weight", 2)
    codebook_size, code_dim = _shape(state, source, "quantize.embedding.weight", 2)
    start, _ = _shape(state, source, "decoder.class_embedding", 2)
    stage = 1 if "decoder.ffn_aux.0.weight" in state else 2
    fields = dict(
        image_size=math.isqrt(patches) * patch,
        patch_size=patch,
        codebook_size=codebook_size,
        code_dim=code_dim,
        encoder_width=encoder_width,
        encoder_layers=_count(state, r"encoder\.transformer\.(\d+)\."),
        decoder_width=decoder_width,
        decoder_layers=_count(state, r"decoder\.transformer\.(\d+)\."),
        stage=stage,
    )
    if stage == 2:
        fields["num_buffer_tokens"] = start
    for preset in TOKENIZERS.values():
        if all(getattr(preset, k) == v for k, v in fields.items() if k not in ("stage", "num_buffer_tokens")):
            return TokenizerConfig.from_dict({**preset.to_dict(), **fields})
    # No shape holds the number of heads; every released model has heads of 64.
    return TokenizerConfig(encoder_heads=encoder_width // 64, decoder_heads=decoder_width // 64, **fields)


def _recognise_generator(state: Mapping[str, Tensor], source: str) -> GeneratorConfig:
    rows, width = _shape(state, source, "embeddings.weight", 2)
    codebook_size, _ = _shape(state, source, "output.weight", 2)
    (head_dim,) = _shape(state, source, "blocks.0.attn.q_norm.weight", 1)
    hidden, _ = _shape(state, source, "blocks.0.mlp.w1.weight", 2)
    found = dict(
        width=width,
        num_layers=_count(state, r"blocks\.(\d+)\."),
        num_heads=width // head_dim,
        hidden=hidden,
        codebook_size=codebook_size,
        num_classes=rows - codebook_size - 2,
    )
    for preset in GENERATORS.values():
        if all(getattr(preset, name) == value for name, value in found.items()):
            return preset
    raise ValueError(
        f"{source}: expected a generator of a preset's size ({', '.join(GENERATORS)}), got {found}; "
        "pass config=GeneratorConfig(...), since no shape tells its grid and guidance"
    )
