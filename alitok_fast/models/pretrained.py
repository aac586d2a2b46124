"""Networks of other libraries, with those libraries' own files of weights: fetched, or read from a path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alitok_fast._library import install_hint
from alitok_fast.storage.tensor_files import read_tensors
from alitok_fast.storage.text import first_line, shown


def library(name: str, whose: str, extra: str) -> Any:
    """The module `name`, which `whose` ("the perceptual losses") need and the extra brings; else ImportError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{whose} need {name.partition('.')[0].replace('_', '-')}, which cannot be imported ({first_line(error)}): "
            f"{install_hint(extra)}"
        ) from error
    except RuntimeError as error:  # operator torchvision::nms does not exist
        raise ImportError(
            f"{name} cannot be imported ({first_line(error)}): install the release of torchvision that belongs to "
            f"torch {torch.__version__}"
        ) from error


def fetched(url: str, weights: str | Path | None, option: str, what: str) -> tuple[Mapping[str, Tensor], str]:
    """Tensors by name, and their file: `weights`, else where torch.hub puts what it fetches from `url`.

    A file name in `url` ends in the beginning of its hash, which is checked. `option` is what messages call `weights`,
    `what` the file ("torchvision's weights"). Raises ValueError for a file of another kind, OSError for one that cannot
    be read or fetched.
    """
    if weights is not None:
        return read_weights(Path(weights), option), str(weights)
    place = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not place.exists():
        try:
            torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:  # no network; another file than it should be
            raise OSError(
                f"{option}: expected {place.name}, {what}, in {place.parent}, and fetching it failed "
                f"({first_line(error)}). Download {url} where there is a network and put it there, or give its "
                f"path as {option}"
            ) from error
    return read_weights(place, option), str(place)


def read_weights(path: Path, option: str) -> Mapping[str, Tensor]:
    """Tensors by name, of a `.safetensors` or of a pickle of nothing else. Raises as `fetched`."""
    try:
        state = read_tensors(path, check=bool)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{option}: expected tensors by name, got {path} with other things in it")
    return state


def fill(network: nn.Module, state: Mapping[str, Tensor], kind: str, source: str, option: str) -> None:
    """Give a network that was made without values those of a file. ValueError where they are not of this network."""
    wanted, expected = network.state_dict(), f"{option}: expected the weights of {kind}, got {shown(source, 300)}"
    for name, value in wanted.items():
        if name not in state:
            raise ValueError(f"{expected} without {name}")
        if state[name].shape != value.shape:
            shapes = tuple(state[name].shape), tuple(value.shape)
            raise ValueError(f"{expected} with {name} of shape {shapes[0]} in place of {shapes[1]}")
    network.load_state_dict({name: state[name].to(value.dtype) for name, value in wanted.items()}, assign=True)
