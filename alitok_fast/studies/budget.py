"""How much training every row of a study gets. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from alitok_fast.storage.text import shown
from alitok_fast.training.run_config import combine
from alitok_fast.training.run_layers import Layer, preset_layer, set_layer


@dataclass(frozen=True)
class Budget:
    """What every row gets.

    `tokenizer` and `generator` change settings of the preset's runs, as `--set` does. `samples` are drawn of each class
    for the distances; `judge_epochs` is how long the judge learns from the training images.
    """

    preset: str = "demo"
    tokenizer: tuple[str, ...] = ()
    generator: tuple[str, ...] = ()
    samples: int = 200
    judge_epochs: int = 3

    def __post_init__(self) -> None:
        for name in ("samples", "judge_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        self._check_sections("tokenizer", self.tokenizer)
        self._check_sections("generator", self.generator)

    @property
    def image_size(self) -> int:
        return self.run("tokenizer", self.tokenizer, {}).model.image_size

    def run(self, kind: str, settings: Sequence[str], own: Mapping[str, Any], stage: int | None = None) -> Any:
        """The settings of a training: the preset, over it `settings`, over these a row's own."""
        preset = preset_layer(kind, {"model": self.preset, "training": self.preset}, stage)
        return combine(kind, [preset, set_layer(kind, settings), Layer("row", dict(own))])

    def _check_sections(self, kind: str, settings: Sequence[str]) -> None:
        """A study decides for itself what a training reads, and what it begins with."""
        plain, run = self.run(kind, (), {}), self.run(kind, settings, {})
        for section in ("start", "data", "watch"):
            for field in fields(getattr(run, section)):
                value = getattr(getattr(run, section), field.name)
                if value != getattr(getattr(plain, section), field.name):
                    raise ValueError(
                        f"{kind}-set: expected settings of the model's sizes and of the training, "
                        f"got {field.name}={shown(value)}"
                    )
