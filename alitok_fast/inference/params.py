"""The settings of sampling: documented once, checked once, passed as one object (arXiv 2506.05289, section 4)."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alitok_fast.config import GeneratorConfig

SEEDS = 2**63
LARGEST = 1e30  # of the numbers that guidance and temperature multiply logits by; float32 ends at 3.4e38


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SamplingParams:
    """The settings that determine an image, besides its label, its id and the weights.

    Attributes:
        guidance_scale: in [0, 1e30]; 0 switches guidance off and halves the work. None takes the model's own.
        guidance_power: in (0, 1e30], the exponent of the guidance schedule. None takes the model's own.
        temperature: 0, or in [1e-30, 1e30]; 0 takes the largest logit at each step.
        top_k: >= 1, keeps the k largest logits. None keeps all.
        top_p: in (0, 1], keeps the smallest set of tokens that has this probability. None keeps all.
        seed: the key of the noise, an integer in [-2**63, 2**63).

    Raises:
        TypeError, ValueError: naming the setting, what was expected and what came.
    """

    guidance_scale: float | None = _setting(
        None, "Strength of the guidance; 0 switches it off. If not given, the model's own."
    )
    guidance_power: float | None = _setting(
        None, "Exponent of the guidance schedule, above 0. If not given, the model's own."
    )
    temperature: float = _setting(1.0, "Temperature of the logits; 0 takes the likeliest token at each step.")
    top_k: int | None = _setting(None, "Sample from the k likeliest tokens, k >= 1. If not given, from all.")
    top_p: float | None = _setting(None, "Sample from the smallest set of tokens with this probability, in (0, 1].")
    seed: int = _setting(0, "Key of the noise, an integer of 64 bits.")

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # plain Python numbers, out of numpy's and 0-dimensional tensors too
        for name in ("guidance_scale", "guidance_power", "temperature", "top_p"):
            value = getattr(self, name)
            if value is not None or name == "temperature":
                set_(self, name, _number(name, value))
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if value is not None or name == "seed":
                set_(self, name, _integer(name, value))
        _check("guidance_scale", self.guidance_scale, lambda x: 0 <= x <= LARGEST, f"a number in [0, {LARGEST:g}]")
        _check("guidance_power", self.guidance_power, lambda x: 0 < x <= LARGEST, f"a number in (0, {LARGEST:g}]")
        in_range = f"0 or a number in [{1 / LARGEST:g}, {LARGEST:g}]"
        _check("temperature", self.temperature, lambda x: x == 0 or 1 / LARGEST <= x <= LARGEST, in_range)
        _check("top_k", self.top_k, lambda x: 1 <= x < SEEDS, "None or an integer in [1, 2**63)")
        _check("top_p", self.top_p, lambda x: 0 < x <= 1, "None or a number in (0, 1]")
        _check("seed", self.seed, lambda x: -SEEDS <= x < SEEDS, "an integer in [-2**63, 2**63)")

    @property
    def guided(self) -> bool:
        """Whether there is guidance, which doubles the rows; known once `resolved`."""
        return self.guidance_scale != 0

    def resolved(self, config: GeneratorConfig) -> SamplingParams:
        """These settings with the model's own guidance where none was given."""
        missing = {
            name: getattr(config, name) for name in ("guidance_scale", "guidance_power") if getattr(self, name) is None
        }
        return dataclasses.replace(self, **missing)

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as JSON values."""
        return dataclasses.asdict(self)


def sampling_params(params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
    """`params`, or the defaults if None, with single settings replaced. Raises TypeError for an unknown setting."""
    if params is not None and not isinstance(params, SamplingParams):
        raise TypeError(f"params: expected SamplingParams or None, got {type(params).__name__}")
    known = [f.name for f in dataclasses.fields(SamplingParams)]
    if unknown := [name for name in overrides if name not in known]:
        raise TypeError(f"{unknown[0]}: expected one of the settings {', '.join(known)}")
    return dataclasses.replace(params or SamplingParams(), **overrides)


def _check(name: str, value: Any, condition: Any, expected: str) -> None:
    if value is not None and not condition(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return number


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
