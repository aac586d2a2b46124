"""Training settings: frozen dataclasses with the paper's values as defaults; unknown keys raise."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Any

from alitok_fast.config import Config

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainConfig(Config):
    """What the tokenizer's and the generator's training have in common.

    `batch_size` is the number of samples in one optimizer step, over all
    `grad_accumulation` micro-batches: more of them take less memory for the
    same result (but for the generator's dropout, which is new in each). `ema_decay` 0 keeps no moving average.
    """

    steps: int = 500_000
    batch_size: int = 64
    grad_accumulation: int = 1
    lr: float = 4e-4
    end_lr: float = 1e-5
    warmup: int = 62_500
    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: float = 0.03
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    ema_decay: float = 0.0
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                self._check(field.name, isinstance(value, int) and not isinstance(value, bool), "a whole number")
            if field.type == "float":
                self._check(field.name, isinstance(value, int | float) and math.isfinite(value), "a finite number")
        betas = self.betas
        self._check(
            "betas",
            isinstance(betas, tuple)
            and len(betas) == 2
            and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas),
            "two numbers from 0 to 1, 1 excluded",
        )
        for name in ("steps", "batch_size", "grad_accumulation", "log_every", "save_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check(
            "batch_size",
            self.batch_size % self.grad_accumulation == 0,
            f"a multiple of grad_accumulation {self.grad_accumulation}",
        )
        self._check("warmup", 0 <= self.warmup <= self.steps, f"0 to steps ({self.steps})")
        self._check("lr", 0 < self.lr, "a positive number")
        self._check("end_lr", 0 <= self.end_lr <= self.lr, f"0 to lr ({self.lr})")
        self._check("precision", self.precision in PRECISIONS, f"one of {PRECISIONS}")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "0 to 1, 1 excluded")
        self._check("weight_decay", self.weight_decay >= 0, "0 or a positive number")
        self._check("seed", 0 <= self.seed < 1 << 63, "0 to 2**63 - 1")
        self._check("max_grad_norm", self.max_grad_norm > 0, "a positive number")

    def _check(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """As for the models' configurations; JSON's lists become tuples again."""
        return super().from_dict({k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class TokenizerTrainConfig(TrainConfig):
    """Stage 1 and stage 2 of the tokenizer (section 3.2); `aux_weight` counts in stage 1 only."""

    steps: int = 350_000
    batch_size: int = 48
    lr: float = 1e-4
    end_lr: float = 2e-6
    warmup: int = 10_000
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    aux_weight: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("aux_weight", self.aux_weight >= 0, "0 or a positive number")


@dataclass(frozen=True)
class GeneratorTrainConfig(TrainConfig):
    """The generator (section 3.3). Dropout rates belong to the model's configuration."""

    batch_size: int = 2048


# The demo fits two CPU cores and an hour: smaller batches, higher rates, shorter schedules (docs/demo.md).
_DEMO: dict[str, Any] = dict(end_lr=2e-5, warmup=100, log_every=25, save_every=100)
_DEMO_STAGE1 = TokenizerTrainConfig(steps=2400, batch_size=64, lr=1e-3, betas=(0.9, 0.99), **_DEMO)
_DEMO_STAGE2 = TokenizerTrainConfig(steps=2000, batch_size=32, lr=1e-3, betas=(0.9, 0.99), **_DEMO)
_DEMO_GENERATOR = GeneratorTrainConfig(steps=4000, batch_size=32, lr=1.5e-3, **_DEMO)
_TOKENIZER = TokenizerTrainConfig()

TOKENIZER_PRESETS: dict[int, dict[str, TokenizerTrainConfig]] = {
    1: {"demo": _DEMO_STAGE1, "256": _TOKENIZER, "512": _TOKENIZER},
    2: {"demo": _DEMO_STAGE2, "256": replace(_TOKENIZER, steps=300_000), "512": replace(_TOKENIZER, steps=300_000)},
}
_GENERATOR = GeneratorTrainConfig()
_XL = replace(_GENERATOR, steps=250_000)
GENERATOR_PRESETS: dict[str, GeneratorTrainConfig] = {
    "demo": _DEMO_GENERATOR,
    **{name: _GENERATOR for name in ("b", "l", "b-512", "l-512")},
    **{name: _XL for name in ("xl", "xl-512")},
}
