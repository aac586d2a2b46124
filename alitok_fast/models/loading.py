"""Models from a name, a folder, a released file or a hub repository."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alitok_fast.config import GeneratorConfig, TokenizerConfig
from alitok_fast.models.generator import Generator
from alitok_fast.models.hub import MODEL_DTYPES, check_model_dtype, fitted
from alitok_fast.models.tokenizer import Tokenizer, encoder_fingerprint
from alitok_fast.storage import checkpoint
from alitok_fast.storage.checkpoint import Checkpoint, read_checkpoint
from alitok_fast.storage.hub import open_checkpoint, resolve
from alitok_fast.storage.state_dict import plain_names

__all__ = [
    "build",
    "check_model_dtype",
    "convert",
    "dtype_from_name",
    "find_stage1",
    "load_generator",
    "load_tokenizer",
    "open_checkpoint",
    "resolve",
    "save_model",
]

_NAMED = {  # by argument
    "dtype": MODEL_DTYPES,
    "weight_dtype": {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "int8": torch.int8,
        "float8_e4m3fn": torch.float8_e4m3fn,
    },
    "activation_dtype": {"int8": torch.int8},
    "decode_dtype": MODEL_DTYPES | {"int8": torch.int8},
    "encode_dtype": MODEL_DTYPES | {"int8": torch.int8},
}
_CLASSES: dict[str, type[Tokenizer] | type[Generator]] = {"tokenizer": Tokenizer, "generator": Generator}


def load_tokenizer(
    path_or_name: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: TokenizerConfig | None = None,
    weights: str = "ema",
) -> Tokenizer:
    """A tokenizer in evaluation mode.

    Args:
        path_or_name: "demo" or "photos-64" (shipped with the package), one of our folders, a released file
            (`.safetensors`, `.pth`, `.pt`, `.bin`; stage and sizes are recognised from its shapes) or a hub repository
            id such as "user/name".
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        config: sizes that no shape tells, of a file without them.
        weights: "ema" takes the moving average where a file holds one beside the weights; "raw" the weights themselves.

    The model is a copy: what happens to its file afterwards does not reach it.
    Raises FileNotFoundError, another OSError or ValueError saying what was expected and found, and in which file.
    """
    return Tokenizer.from_pretrained(path_or_name, device, dtype, config, weights)


def load_generator(
    path_or_name: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: GeneratorConfig | None = None,
    weights: str = "ema",
) -> Generator:
    """A generator in evaluation mode; arguments and errors as for `load_tokenizer`."""
    return Generator.from_pretrained(path_or_name, device, dtype, config, weights)


def save_model(
    folder: str | os.PathLike,
    model: Tokenizer | Generator,
    provenance: dict[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write `model` as a folder of ours: config.json (with `provenance`) and model.safetensors.

    A compiled model, or one inside DistributedDataParallel, is written as the model that it holds. Tensors that share
    memory are written as copies. Raises TypeError for another module, and ValueError where `model` holds other tensors
    than its configuration says (adapters, parametrizations), or where files that are no model of ours would be written
    over, unless `force`.
    """
    inner = _inside_wrappers(model)
    if not isinstance(inner, (Tokenizer, Generator)):
        raise TypeError(f"model: expected a Tokenizer or Generator, got {type(inner).__name__}")
    state = plain_names(inner.state_dict(), "model")
    fitted(type(inner), inner.config, state, "model")
    return checkpoint.write_checkpoint(folder, Checkpoint(inner.config, state, provenance or {}), force)


def _inside_wrappers(model: nn.Module) -> nn.Module:
    """What torch.compile and DistributedDataParallel hold; they keep it among their modules, under these names."""
    while isinstance(model, nn.Module):
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None:
            break
        model = inner
    return model


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

    Beside a file x.pth comes x.pth.json, with the configuration, the class names and the provenance, for which the
    released format has no place; `load_generator("x.pth")` reads both.

    Args:
        kind: "tokenizer" or "generator", where `source` holds both.
        dtype: None keeps the precision.
        weights: as for `load_tokenizer`.
        force: also write over `source` itself, and over files that are no model of ours.

    Returns:
        `target`. Raises as `load_tokenizer` does, before anything is written.
    """
    if kind not in (None, "tokenizer", "generator"):
        raise ValueError(f"kind: expected 'tokenizer' or 'generator', got {kind!r}")
    if Path(target).suffix not in ("", *checkpoint.SUFFIXES):
        raise ValueError(
            f"target: expected a folder, or a file ending in {', '.join(checkpoint.SUFFIXES)}, got {target}"
        )
    if dtype is not None:
        check_model_dtype(dtype)
    path, target = resolve(source, kind or ""), Path(target)
    if not force:
        checkpoint.check_target(target, folder=not target.suffix)
        if target.exists() and target.samefile(path):
            raise ValueError(f"target: expected another place than the source, got {target}; force writes over it")
    if kind is None and (path / "tokenizer").is_dir():
        raise ValueError(f"kind: expected 'tokenizer' or 'generator' for {source}, which holds both, got none")
    original = read_checkpoint(path, weights=weights)
    if kind not in (None, original.kind):
        raise ValueError(f"source: expected a {kind}, got a {original.kind} in {source}")
    fitted(_CLASSES[original.kind], original.config, original.state, original.path)
    state = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in original.state.items()}
    write = checkpoint.write_file if target.suffix else checkpoint.write_checkpoint
    provenance = original.provenance
    if original.kind == "tokenizer":  # rounded, it is still what generators were trained with
        provenance = {"fingerprint": encoder_fingerprint(original.state), **provenance}
    return write(target, replace(original, state=state, provenance=provenance), force)


def build(source: Checkpoint) -> Tokenizer | Generator:
    """The module of a checkpoint, holding its weights. Raises ValueError, naming its file, where they do not fit."""
    return _CLASSES[source.kind].from_checkpoint(source)


def find_stage1(model: str, stage1: str | None = None) -> str | None:
    """The causal tokenizer that paints rows for `model`: `stage1`, or the model's own folder of that name, or None."""
    if stage1 is not None:
        return stage1
    try:
        found = resolve(model, "stage1")
    except FileNotFoundError:
        return None
    return str(found) if found.name == "stage1" else None
