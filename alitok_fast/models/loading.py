"""Models from a name, a folder, a released file or a hub repository."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alitok_fast._library import install_hint
from alitok_fast.config import GENERATORS, TOKENIZERS, GeneratorConfig, TokenizerConfig
from alitok_fast.models.generator import Generator
from alitok_fast.models.tokenizer import Tokenizer, encoder_fingerprint
from alitok_fast.storage import checkpoint
from alitok_fast.storage.checkpoint import Checkpoint, read_checkpoint
from alitok_fast.storage.state_dict import plain_names
from alitok_fast.storage.text import shown

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

    Args:
        path_or_name: "demo" (shipped with the package), one of our folders, a released file (`.safetensors`, `.pth`,
            `.pt`, `.bin`; stage and sizes are recognised from its shapes) or a hub repository id such as "user/name".
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        config: sizes that no shape tells, of a file without them.
        weights: "ema" takes the moving average where a file holds one beside the weights; "raw" the weights themselves.

    The model is a copy: what happens to its file afterwards does not reach it.
    Raises FileNotFoundError, another OSError or ValueError saying what was expected and found, and in which file.
    """
    return _load("tokenizer", path_or_name, device, dtype, config, weights)


def load_generator(
    path_or_name: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: GeneratorConfig | None = None,
    weights: str = "ema",
) -> Generator:
    """A generator in evaluation mode; arguments and errors as for `load_tokenizer`."""
    return _load("generator", path_or_name, device, dtype, config, weights)


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
    _fit(inner.config, state, "model")
    return checkpoint.write_checkpoint(folder, Checkpoint(inner.config, state, provenance or {}), force)


def _inside_wrappers(model: nn.Module) -> nn.Module:
    """What torch.compile and DistributedDataParallel hold; they keep it among their modules, under these names."""
    while isinstance(model, nn.Module):
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None:
            break
        model = inner
    return model


def check_model_dtype(dtype: torch.dtype) -> None:
    """ValueError for a dtype that no model computes in."""
    if dtype not in _DTYPES.values():
        expected = "float32, bfloat16 or float16"
        raise ValueError(f"dtype: expected {expected}, got {str(dtype).removeprefix('torch.')}")


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
    _fit(original.config, original.state, original.path)
    state = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in original.state.items()}
    write = checkpoint.write_file if target.suffix else checkpoint.write_checkpoint
    provenance = original.provenance
    if original.kind == "tokenizer":  # rounded, it is still what generators were trained with
        provenance = {"fingerprint": encoder_fingerprint(original.state), **provenance}
    return write(target, replace(original, state=state, provenance=provenance), force)


def resolve(path_or_name: str | os.PathLike, kind: str) -> Path:
    """The local path of a model, fetched from the hub where it is a repository id.

    `kind` is the folder that holds it in a pipeline's: "tokenizer", "generator", or "stage1" for a causal tokenizer.
    """
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
    source = read_checkpoint(resolve(path_or_name, kind), config, weights)
    if source.kind != kind:
        raise ValueError(f"path_or_name: expected a {kind}, got a {source.kind} in {path_or_name}")
    return source


def _load(kind: str, path_or_name, device, dtype, config, weights) -> Any:
    check_model_dtype(dtype)
    return build(open_checkpoint(kind, path_or_name, config, weights)).to(device, dtype).eval()


def build(source: Checkpoint) -> Tokenizer | Generator:
    """The module of a checkpoint, holding its weights. Raises ValueError, naming its file, where they do not fit."""
    model = _fit(source.config, source.state, source.path)
    expected = model.state_dict()
    state = {name: source.state[name] for name in expected if name in source.state}
    for name in set(expected) - set(state):
        state[name] = torch.zeros(expected[name].shape, dtype=torch.float32, device="cpu")
    model.load_state_dict(state, assign=True)
    return model


def _fit(config: TokenizerConfig | GeneratorConfig, state: dict[str, Tensor], path: str) -> Tokenizer | Generator:
    """The module of `config`, without memory, once all tensors of `state` fit it."""
    checkpoint.check_sizes(config, state, path, "config")
    with torch.device("meta"):
        model = Tokenizer(config) if isinstance(config, TokenizerConfig) else Generator(config)
    expected = model.state_dict()
    wrong = [
        f"{name}: expected shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing = sorted(set(expected) - set(state) - _OPTIONAL_KEYS)
    unexpected = sorted(set(state) - set(expected) - _OPTIONAL_KEYS)
    wrong += [f"{name}: expected, missing" for name in missing]
    wrong += [f"{shown(name)}: unexpected" for name in unexpected]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit {config}; the first: {wrong[0]}")
    return model
