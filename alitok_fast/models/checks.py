"""Argument checks of the models' public functions: each message names argument, expected and actual."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

# Settings of a layer that only count in training, or that a check of its own covers.
_FREE = {"training", "p", "dropout", "inplace", "config", "commitment", "usage_decay"}
# What sampling itself calls, and `model(...)` does not: an own one counts where it is called.
_STEPS = {"step", "sample_passes", "new_cache", "tensors"}


def check_tensor(name: str, value: object, dtype: torch.dtype | None, shape: tuple, device: torch.device) -> None:
    """`dtype` None means any floating-point type. `shape` entries: an int, or a string such as "B" for any length."""
    expected_dtype = "a floating-point" if dtype is None else str(dtype).removeprefix("torch.")
    if dtype is not None:
        expected_dtype = f"an {expected_dtype}" if expected_dtype.startswith("int") else f"a {expected_dtype}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected_dtype} tensor, got {type(value).__name__}")
    if not (value.is_floating_point() if dtype is None else value.dtype == dtype):
        raise TypeError(f"{name}: expected {expected_dtype} tensor, got {str(value.dtype).removeprefix('torch.')}")
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_range(name: str, value: Tensor, low: float, high: float, closed: bool = False) -> None:
    """Every element in [low, high), or in [low, high] where `closed`; NaN is outside. Skipped under torch.compile."""
    if torch.compiler.is_compiling() or not value.numel():
        return
    inside = (value >= low) & (value <= high if closed else value < high)
    if not bool(inside.all()):
        bracket = "]" if closed else ")"
        worst = value[~inside].flatten()[0].item()
        # Enough digits to tell it from its neighbours, such as 1.00000012.
        short = value.is_floating_point() and value.dtype != torch.float64
        got = f"{worst:.9g}" if short else repr(worst)
        raise ValueError(f"{name}: expected values in [{low}, {high}{bracket}, got {got}")


def check_finite(name: str, value: Tensor) -> Tensor:
    """`value`, where no element is NaN or infinite. Skipped under torch.compile, and for tensors without values."""
    if not torch.compiler.is_compiling() and not value.is_meta and not bool(value.isfinite().all()):
        worst = value[~value.isfinite()].flatten()[0].item()
        why = "the model's weights are not numbers, or its precision overflows"
        raise ValueError(f"{name}: expected finite values, got {worst}: {why}")
    return value


def check_plain(model: nn.Module) -> None:
    """That `model(...)` is what its weights and its configuration say, and nothing else.

    Sampling reads the weights and computes by itself. Adapters (LoRA), hooks, parametrizations, other classes in place
    of a layer, or a replaced `forward` would count in `model(...)` and not there. Raises ValueError naming the first
    module at fault, what was found and what to do.
    """
    if not type(model).__module__.startswith(__name__.rpartition(".")[0] + ".") or not hasattr(model, "config"):
        raise ValueError(
            f"model: expected a Generator or Tokenizer itself, got {type(model).__name__}; of a compiled or wrapped "
            "model, pass the one inside (compiled._orig_mod, wrapped.module)"
        )
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        raise ValueError(_fault("model", "no hooks for all modules", "some", "remove them (handle.remove())"))
    plain = dict(type(model)(model.config, device="meta").named_modules())
    found = dict(model.named_modules(remove_duplicate=False))
    for name in sorted(found.keys() ^ plain.keys()):
        _check_module(name.rpartition(".")[0], found, plain)  # a strange class says more than its strange parts
        got, expected = ("one", "no such module") if name in found else ("none", f"a {type(plain[name]).__name__}")
        raise ValueError(_fault(name, expected, got, "merge or remove adapters"))
    for name in plain:
        _check_module(name, found, plain)


def _check_module(name: str, found: dict[str, nn.Module], plain: dict[str, nn.Module]) -> None:
    """One module beside the one that the model's configuration builds in its place."""
    if name not in found or name not in plain:
        return
    module, expected, shown = found[name], plain[name], name or "model"
    if type(module) is not type(expected):
        advice = "merge or remove adapters, parametrizations (torch.nn.utils.parametrize.remove_parametrizations) and "
        advice += "wrappers (a compiled module's is ._orig_mod)"
        raise ValueError(_fault(shown, f"a {type(expected).__name__}", f"a {type(module).__name__}", advice))
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(_fault(shown, "no forward hooks", "some", "remove them (handle.remove(), or prune.remove)"))
    own = sorted(key for key in vars(module) if callable(getattr(type(expected), key, None)) and key not in _STEPS)
    if own:
        raise ValueError(_fault(shown, f"the {own[0]} of its class", "another one", f"delete the attribute {own[0]}"))
    for kind in ("_parameters", "_buffers"):
        have, want = getattr(module, kind), getattr(expected, kind)
        for key in sorted(have.keys() ^ want.keys()):
            expectation, got = ("nothing", "a tensor") if key in have else ("a tensor", "nothing")
            raise ValueError(_fault(f"{shown}.{key}", expectation, got, "merge or remove adapters"))
        for key, tensor in have.items():
            if (tensor is None) != (want[key] is None) or type(tensor) not in (type(None), Tensor, nn.Parameter):
                advice = "load or build the model with plain weights"
                raise ValueError(_fault(f"{shown}.{key}", "a plain tensor", type(tensor).__name__, advice))
            if tensor is not None and tensor.shape != want[key].shape:
                advice = "make it anew from a configuration of these sizes"
                raise ValueError(_fault(f"{shown}.{key}", tuple(want[key].shape), tuple(tensor.shape), advice))
    for key, value in vars(expected).items():
        simple = isinstance(value, int | float | str | tuple | torch.device | None)
        if simple and not key.startswith("_") and key not in _FREE and vars(module).get(key) != value:
            advice = "make the model anew from a configuration that says so"
            raise ValueError(_fault(f"{shown}.{key}", value, vars(module).get(key), advice))


def _fault(where: str, expected: object, got: object, advice: str) -> str:
    return f"{where}: expected {expected}, got {got}, which counts in model(...) and not in sampling; {advice}"
