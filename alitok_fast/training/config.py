"""Training settings: frozen dataclasses with the paper's values as defaults; unknown keys raise."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Any

from alitok_fast.config import Config, later
from alitok_fast.training.phases import Phase, Schedule

PRECISIONS = ("fp32", "bf16", "fp16")
PARALLELS = ("ddp", "fsdp")
DECAYED = ("all", "matrices")
CLASSIFIERS = ("convnext_small", "efficientnet_lite0")
LPIPS_TRUNKS = ("vgg", "alex", "squeeze")
INITIALIZATIONS = ("transform_coder", "noise")


@dataclass(frozen=True)
class TrainConfig(Config):
    """What the tokenizer's and the generator's training have in common.

    `batch_size` is the number of samples in one optimizer step, over all processes and all `grad_accumulation`
    micro-batches: more of them take less memory for the same result (but for the generator's dropout, which is new in
    each). `max_grad_norm` 0 does not clip, `ema_decay` 0 keeps no moving average; another one begins as (1 + step) /
    (10 + step), where that is lower. `weight_decay_on` "matrices" leaves out biases, norms and embeddings. `precision`
    "fp16" scales the loss. `parallel` is for several processes: "ddp" copies the model to each, "fsdp" spreads its
    weights and the optimizer's state over them. With `plateau_patience` above 0 the learning rate is multiplied by
    `plateau_factor` where the mean loss has not fallen for so many steps.
    Every `pictures_every` steps (0: never) pictures are written, and every `evaluate_every` steps (0: never) the model
    is evaluated on `evaluate_images` images.
    """

    steps: int = 500_000
    batch_size: int = 64
    grad_accumulation: int = 1
    lr: float = 4e-4
    end_lr: float = 1e-5
    warmup: int = 62_500
    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: float = 0.03
    weight_decay_on: str = "matrices"
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    ema_decay: float = 0.0
    plateau_patience: int = 0
    plateau_factor: float = 0.5
    parallel: str = "ddp"
    activation_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    pictures_every: int = 1000
    evaluate_every: int = later(0)
    evaluate_images: int = later(5000)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                self._check(field.name, isinstance(value, int) and not isinstance(value, bool), "a whole number")
            if field.type == "bool":
                self._check(field.name, isinstance(value, bool), "true or false")
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
        self._check("parallel", self.parallel in PARALLELS, f"one of {PARALLELS}")
        self._check("weight_decay_on", self.weight_decay_on in DECAYED, f"one of {DECAYED}")
        for name in ("plateau_patience", "pictures_every", "evaluate_every"):
            self._check(name, getattr(self, name) >= 0, "0 or a positive number")
        self._check("evaluate_images", self.evaluate_images >= 4, "at least 4")  # precision looks at three neighbours
        self._check("plateau_factor", 0 < self.plateau_factor <= 1, "0 to 1, 0 excluded")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "0 to 1, 1 excluded")
        self._check("weight_decay", self.weight_decay >= 0, "0 or a positive number")
        self._check("seed", 0 <= self.seed < 1 << 63, "0 to 2**63 - 1")
        self._check("max_grad_norm", self.max_grad_norm >= 0, "0 or a positive number")

    def _check(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """As for the models' configurations; lists become tuples again. `phases` give `steps` where it is absent."""
        values = dict(values)
        if isinstance(values.get("betas"), list):
            values["betas"] = tuple(values["betas"])
        if isinstance(values.get("phases"), list | tuple):
            values["phases"] = tuple(Phase.from_dict(p) if isinstance(p, dict) else p for p in values["phases"])
            if values["phases"]:
                values.setdefault("steps", sum(phase.steps for phase in values["phases"]))
        return super().from_dict(values)

    @property
    def schedule(self) -> Schedule:
        """One phase of all steps."""
        return Schedule([Phase(self.steps, self.lr, self.end_lr)], self.steps, self.warmup)


@dataclass(frozen=True)
class TokenizerTrainConfig(TrainConfig):
    """Stage 1 and stage 2 of the tokenizer (section 3.2); `aux_weight` counts in stage 1 only.

    `phases` say how the steps are divided; without them all are one phase from `lr` to `end_lr` without perceptual or
    adversarial losses. `perceptual_network` and `lpips_network` are those that the phases' weights are for;
    `perceptual_weights` and `lpips_weights` name their files, else the libraries that have them fetch them.
    `adaptive_adversarial` multiplies the adversarial weight by the ratio of the gradients' norms at the decoder's last
    layer (VQGAN, arXiv 2012.09841, equation 7). `r1` and `lecam` weigh two regularisers of the discriminator
    (arXiv 1801.04406; 2104.03310). `freeze_encoder` trains the decoder alone, on the codes there are.
    `initialization` is how what is new begins: all of stage 1, the decoder of stage 2.
    """

    steps: int = 350_000
    batch_size: int = 48
    lr: float = 1e-4
    end_lr: float = 2e-6
    warmup: int = 10_000
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    weight_decay_on: str = "all"
    max_grad_norm: float = 0.0
    aux_weight: float = 10.0
    phases: tuple[Phase, ...] = ()
    perceptual_network: str = "convnext_small"
    perceptual_weights: str = ""
    lpips_network: str = "vgg"
    lpips_weights: str = ""
    adaptive_adversarial: bool = False
    r1: float = 0.0
    lecam: float = 0.0
    freeze_encoder: bool = False
    initialization: str = later("transform_coder")

    def __post_init__(self) -> None:
        super().__post_init__()
        phases = self.phases
        self._check(
            "phases", isinstance(phases, tuple) and all(isinstance(p, Phase) for p in phases), "a tuple of phases"
        )
        for name in ("aux_weight", "r1", "lecam"):
            self._check(name, getattr(self, name) >= 0, "0 or a positive number")
        self._check("perceptual_network", self.perceptual_network in CLASSIFIERS, f"one of {CLASSIFIERS}")
        self._check("lpips_network", self.lpips_network in LPIPS_TRUNKS, f"one of {LPIPS_TRUNKS}")
        self._check("initialization", self.initialization in INITIALIZATIONS, f"one of {INITIALIZATIONS}")

    @property
    def schedule(self) -> Schedule:
        """`phases`, else one of all steps."""
        phases = self.phases or [Phase(self.steps, self.lr, self.end_lr)]
        return Schedule(phases, self.steps, self.warmup)


@dataclass(frozen=True)
class GeneratorTrainConfig(TrainConfig):
    """The generator (section 3.3). Dropout rates belong to the model's configuration."""

    batch_size: int = 2048


def check_share(config: TrainConfig, world: int) -> None:
    """ValueError where `world` processes cannot each take the same share of every micro-batch."""
    if config.batch_size % (config.grad_accumulation * world):
        raise ValueError(
            f"batch_size: expected a multiple of {world} processes x grad_accumulation {config.grad_accumulation}, "
            f"got {config.batch_size}"
        )


def _published(first: int, second: int, third: int) -> TokenizerTrainConfig:
    """The three phases of both stages (section 3.2; the released code's weights)."""
    phases = (
        Phase(first, 1e-4, perceptual=0.1, lpips=1.0),
        Phase(second, 1e-4, 2e-5, perceptual=1.0),
        Phase(third, 2e-5, 2e-6, perceptual=1.0, adversarial=0.05),
    )
    return TokenizerTrainConfig(steps=first + second + third, phases=phases, precision="fp16")


# The demo fits two CPU cores and an afternoon: smaller batches, higher rates, shorter schedules (docs/demo.md).
_DEMO: dict[str, Any] = dict(end_lr=2e-5, warmup=100, log_every=25, save_every=100)
_DEMO_TOKENIZER: dict[str, Any] = dict(
    _DEMO, lr=1e-3, betas=(0.9, 0.99), max_grad_norm=1.0, weight_decay_on="matrices", pictures_every=200
)
_DEMO_STAGE1 = TokenizerTrainConfig(steps=5000, batch_size=64, **_DEMO_TOKENIZER)
_DEMO_STAGE2 = TokenizerTrainConfig(
    steps=4100, batch_size=32, **_DEMO_TOKENIZER, adaptive_adversarial=True, lecam=1e-3,
    phases=(Phase(1500, 1e-3, 3e-4), Phase(2600, 3e-4, 2e-5, adversarial=0.5)),
)  # fmt: skip
_DEMO_GENERATOR = GeneratorTrainConfig(steps=16_000, batch_size=32, lr=1.5e-3, ema_decay=0.999, **_DEMO)
# A few hundred photographs in 20 minutes on two cores (docs/training.md).
_PHOTOS = TokenizerTrainConfig(steps=2000, batch_size=16, **_DEMO_TOKENIZER)
_STAGE1, _STAGE2 = _published(50_000, 200_000, 100_000), _published(50_000, 150_000, 100_000)

TOKENIZER_PRESETS: dict[int, dict[str, TokenizerTrainConfig]] = {
    1: {"demo": _DEMO_STAGE1, "photos-64": _PHOTOS, "256": _STAGE1, "512": _STAGE1},
    2: {"demo": _DEMO_STAGE2, "photos-64": _PHOTOS, "256": _STAGE2, "512": _STAGE2},
}
_GENERATOR = GeneratorTrainConfig()
_XL = replace(_GENERATOR, steps=250_000)
GENERATOR_PRESETS: dict[str, GeneratorTrainConfig] = {
    "demo": _DEMO_GENERATOR,
    "photos-64": replace(_DEMO_GENERATOR, steps=1000, batch_size=16, ema_decay=0.0),
    **{name: _GENERATOR for name in ("b", "l", "b-512", "l-512")},
    **{name: _XL for name in ("xl", "xl-512")},
}
