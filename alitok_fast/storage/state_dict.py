"""The weights among what training scripts write: wrappers, averages, prefixes of names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from alitok_fast.storage.text import shown

WEIGHTS = ("ema", "raw")
AVERAGE = "moving average"
"""What provenance says under "weights" where an average was taken."""

# Where the weights are, in the files of: torch's tutorials, timm, Lightning; the reference's own trainer; DeepSpeed.
_RAW_KEYS = ("state_dict", "model", "model_state", "model_state_dict", "module", "net", "network")
_INSIDE_EMA = (*_RAW_KEYS, "shadow", "ema_model")
_EMA_KEY = re.compile(r"(^|[_.])ema([_.]|$)", re.IGNORECASE)
# Parts of names that wrappers add: DistributedDataParallel and AveragedModel, torch.compile, FSDP, activation
# checkpointing. No module of ours has such a name.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DEPTH = 4


class State(NamedTuple):
    """Tensors by their released names; `key` is where the file had them, if they are an average, else None."""

    tensors: dict[str, Tensor]
    key: str | None


def check_weights(weights: str) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}")


def unwrap(loaded: Any, path: Path, weights: str = "ema") -> State:
    """The state dict out of what a file holds; `weights` "ema" prefers a moving average, "raw" leaves it.

    Raises ValueError naming the file and the keys in it, where none is a dictionary of tensors or several are.
    """
    found, average = loaded, None
    for _ in range(_DEPTH):
        if _is_state(found) or not isinstance(found, dict):
            break
        raw = [key for key in (_INSIDE_EMA if average else _RAW_KEYS) if _holds_tensors(found.get(key))]
        ema = [] if average else [key for key in found if isinstance(key, str) and _EMA_KEY.search(key)]
        ema = [key for key in ema if _holds_tensors(found[key])]
        if ema and weights == "raw" and not raw:
            raise ValueError(f"{path}: expected raw weights, got a moving average alone, {shown(ema[0])}; take 'ema'")
        candidates = ema if ema and weights == "ema" else raw
        if len(candidates) != 1:
            break
        if candidates is ema:
            average = ema[0]
        found = found[candidates[0]]
    if not _is_state(found):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {_described(found)}")
    return State(plain_names(found, str(path)), average)


def plain_names(state: Mapping[str, Any], source: str = "state") -> dict[str, Any]:
    """`state` without what wrappers add to names; ValueError where two names become one."""
    plain: dict[str, Any] = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short == "n_averaged":  # AveragedModel's counter
            continue
        if short in plain:
            raise ValueError(f"{source}: expected one tensor {shown(short)}, got {shown(name)} beside it")
        plain[short] = tensor
    return plain


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _holds_tensors(value: Any, depth: int = _DEPTH) -> bool:
    """Whether tensors are somewhere inside: an average that is a list, too, must not be passed over in silence."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    if depth == 0 or not isinstance(value, dict | list | tuple):
        return False
    return any(_holds_tensors(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))


def _described(value: Any) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    if not value:
        return "an empty dictionary"
    names = ", ".join(shown(key, 40) for key in list(value)[:8])
    return f"a dictionary of {names}{', ...' if len(value) > 8 else ''}"
