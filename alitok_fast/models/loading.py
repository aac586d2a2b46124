"""Models from a name, a folder, a released file or a hub repository."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from alitok_fast._library import install_hint
from alitok_fast.config import GENERATORS, TOKENIZERS, GeneratorConfig, TokenizerConfig
from alitok_fast.models.generator import Generator
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.storage import checkpoint
from alitok_fast.storage.checkpoint import Checkpoint, read_checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMED = {  # by argument
    "dtype": _DTYPES,
    "weight_dtype": {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "int8": torch.int8,
        "float8_e4m3fn": torch.float8_e4m3fn,
    },
    "decode_dtype": _DTYPES | {"int8": torch.int8},
}
_OPTIONAL_KEYS = {"quantize.embed_prob"}  # training statistics: absent from released stage-2 files


def load_tokenizer(
    path_or_name: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: TokenizerConfig | None = None,
    weights: str = "ema",
) -> Tokenizer:
    """A tokenizer in evaluation mode.

    `path_or_name`: "demo" (shipped with the package), one of our folders, a released file (`.safetensors`, `.pth`,
    `.pt`, `.bin`; stage and sizes are recognised from its shapes) or a hub repository id such as "user/name".
    Raises FileNotFoundError or ValueError saying what was expected and found.
    """
    return _load("tokenizer", path_or_name, device, dtype, config)


def load_generator(
    path_or_name: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: GeneratorConfig | None = None,
    weights: str = "ema",
) -> Generator:
    """A generator in evaluation mode; `path_or_name` as for `load_tokenizer`."""
    return _load("generator", path_or_name, device, dtype, config)


def save_model(
    folder: str | os.PathLike, model: Tokenizer | Generator, provenance: dict[str, Any] | None = None
) -> Path:
    """Write `model` as a folder of ours: config.json (with `provenance`) and model.safetensors."""
    return checkpoint.write_checkpoint(folder, Checkpoint(model.config, model.state_dict(), provenance or {}))


def dtype_from_name(name: str | None, argument: str = "dtype") -> torch.dtype | None:
    """The torch dtype called `name`, None for None: of a model ("dtype"), its "weight_dtype" or the "decode_dtype"."""
    known = _NAMED[argument]
    if name is not None and name not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {name!r}")
    return None if name is None else known[name]


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    kind: str | None = None,
    dtype: torch.dtype | None = None,
    weights: str = "ema",
    force: bool = False,
) -> Path:
    """Write a checkpoint as a file in the released format (a `target` with its suffix) or as a folder of ours.

    `kind`, "tokenizer" or "generator", is needed where `source` holds both. `dtype` None keeps the precision.
    Returns `target`. Raises as `load_tokenizer` does, before anything is written.
    """
    if kind not in (None, "tokenizer", "generator"):
        raise ValueError(f"kind: expected 'tokenizer' or 'generator', got {kind!r}")
    if Path(target).suffix not in ("", *checkpoint.SUFFIXES):
        raise ValueError(
            f"target: expected a folder, or a file ending in {', '.join(checkpoint.SUFFIXES)}, got {target}"
        )
    path = resolve(source, kind or "")
    if kind is None and (path / "tokenizer").is_dir():
        raise ValueError(f"kind: expected 'tokenizer' or 'generator' for {source}, which holds both, got none")
    original = read_checkpoint(path)
    if kind not in (None, original.kind):
        raise ValueError(f"source: expected a {kind}, got a {original.kind} in {source}")
    state = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in original.state.items()}
    converted = Checkpoint(original.config, state, original.provenance)
    build(converted)  # raises where tensors do not fit
    return (
        checkpoint.write_released(target, state)
        if Path(target).suffix
        else checkpoint.write_checkpoint(target, converted)
    )


def resolve(path_or_name: str | os.PathLike, kind: str) -> Path:
    """The local path of a `kind` ("tokenizer" or "generator"), fetched from the hub where it is a repository id."""
    name = str(path_or_name)
    if name == "demo":  # a folder of that name is "./demo"
        return Path(str(resources.files("alitok_fast") / "weights" / "demo" / kind))
    path = Path(path_or_name)
    if path.exists():
        part = path / kind
        return part if part.is_dir() else path
    presets = TOKENIZERS if kind == "tokenizer" else GENERATORS
    if name in presets:
        raise ValueError(
            f"path_or_name: expected weights, got the preset {name!r}, whose weights are not shipped; "
            "give the path of a released checkpoint file"
        )
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not path.suffix:
        return resolve(_fetch(name, kind), kind)
    raise FileNotFoundError(
        "path_or_name: expected 'demo', a checkpoint file or folder, or a hub repository id, "
        f"got {name!r}, which does not exist"
    )


def _fetch(repository: str, kind: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{repository!r} is no local path, and fetching it from the hub needs huggingface_hub: "
            f"{install_hint('hub')}"
        ) from None
    names = (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME)
    patterns = [f"{prefix}{name}" for prefix in ("", f"{kind}/") for name in names]
    return Path(snapshot_download(repository, allow_patterns=patterns))


def open_checkpoint(
    kind: str,
    path_or_name: str | os.PathLike,
    config: TokenizerConfig | GeneratorConfig | None = None,
    weights: str = "ema",
) -> Checkpoint:
    """The checkpoint that `load_tokenizer` or `load_generator` builds, with its provenance."""
    source = read_checkpoint(resolve(path_or_name, kind), config)
    if source.kind != kind:
        raise ValueError(f"path_or_name: expected a {kind}, got a {source.kind} in {path_or_name}")
    return source


def _load(kind: str, path_or_name, device, dtype, config) -> Any:
    return build(open_checkpoint(kind, path_or_name, config)).to(device, dtype).eval()


def build(source: Checkpoint) -> Tokenizer | Generator:
    """The module of a checkpoint, holding its weights."""
    model_class: Callable[[Any], Tokenizer | Generator] = Tokenizer if source.kind == "tokenizer" else Generator
    with torch.device("meta"):
        model = model_class(source.config)
    expected = model.state_dict()
    wrong = [
        f"{name}: expected shape {tuple(tensor.shape)}, got {tuple(source.state[name].shape)}"
        for name, tensor in expected.items()
        if name in source.state and source.state[name].shape != tensor.shape
    ]
    missing = sorted(set(expected) - set(source.state) - _OPTIONAL_KEYS)
    unexpected = sorted(set(source.state) - set(expected) - _OPTIONAL_KEYS)
    wrong += [f"{name}: expected, missing" for name in missing] + [f"{name}: unexpected" for name in unexpected]
    if wrong:
        raise ValueError(f"checkpoint: {len(wrong)} tensors do not fit {source.config}; the first: {wrong[0]}")
    state = {name: source.state[name] for name in expected if name in source.state}
    for name in set(expected) - set(state):
        state[name] = torch.zeros(expected[name].shape)
    model.load_state_dict(state, assign=True)
    return model
