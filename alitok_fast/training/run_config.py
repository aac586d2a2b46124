"""Run files: all settings of a training run in one TOML file that can be shown, edited, stored and run.

Settings come in layers, each of which overrides those before: a preset, a run file, --set, options. Loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alitok_fast import __version__
from alitok_fast.config import Config, GeneratorConfig, TokenizerConfig
from alitok_fast.storage.toml import toml_lines
from alitok_fast.training.config import GeneratorTrainConfig, TokenizerTrainConfig
from alitok_fast.training.phases import Phase
from alitok_fast.training.run_layers import Layer
from alitok_fast.training.run_settings import (
    AUTO,
    PARTS,
    SECTIONS,
    GeneratorStart,
    GeneratorWatch,
    PictureData,
    Setting,
    TokenData,
    TokenizerStart,
    TokenizerWatch,
    settings_of,
    values_of,
)

RUN_FILE = "run.toml"


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run: the model, what it begins with, how it is trained, on what, and what is shown."""

    kind: str
    model: TokenizerConfig | GeneratorConfig
    start: TokenizerStart | GeneratorStart
    training: TokenizerTrainConfig | GeneratorTrainConfig
    data: PictureData | TokenData
    watch: TokenizerWatch | GeneratorWatch

    def values(self) -> dict[str, Any]:
        """Every setting by path."""
        return values_of(self.kind, {part: getattr(self, part) for part in PARTS[self.kind]})

    def to_toml(self) -> str:
        """The complete run file; ValueError names a value that TOML does not hold."""
        lines = [f"# alitok-fast {__version__}: alitok-fast train {self.kind} --config {RUN_FILE} --out RUN"]
        lines += ["# docs/configuration.md has the meaning of each setting.", *toml_lines({"kind": self.kind})]
        values, settings = self.values(), settings_of(self.kind)
        for section in SECTIONS:
            lines += ["", f"[{section}]"]
            own = [setting for setting in settings.values() if setting.section == section]
            for setting in own:
                lines += _line(setting, values[setting.path])
            for phase in values.get("training.phases", ()) if section == "training" else ():
                lines += ["", "[[training.phases]]", *toml_lines(_said(phase))]
        return "\n".join(lines) + "\n"


def _line(setting: Setting, value: Any) -> list[str]:
    """One setting; what TOML has no word for stands in a comment."""
    if value is None and not setting.has_auto:
        return [f'# {setting.name} = ""']
    if "Phase" in setting.type and value:
        return []
    try:
        return toml_lines({setting.name: AUTO if value is None else value})
    except ValueError as error:
        raise ValueError(f"{setting.path}: {error}") from None


def _said(phase: Phase) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(phase).items() if value is not None}


def combine(kind: str, layers: Sequence[Layer]) -> RunConfig:
    """The run that the layers make, each overriding those before; the first holds all settings.

    Raises ValueError naming the layer and the setting at fault.
    """
    values: dict[str, Any] = {}
    origin: dict[str, int] = {}
    for number, layer in enumerate(layers):
        values |= layer.values
        origin |= dict.fromkeys(layer.values, number)
    settings = settings_of(kind)
    _check_phases(values, origin, layers, settings)
    _check_warmup(values, origin, layers, settings)
    parts = {}
    for part, config in PARTS[kind].items():
        own = {s.name: values[path] for path, s in settings.items() if s.part == part and path in values}
        try:
            parts[part] = config.from_dict(own)
        except ValueError as error:
            name = str(error).partition(":")[0]
            found = next((s for s in settings.values() if s.part == part and s.name == name), None)
            if found is None or found.path not in origin or origin[found.path] == 0:
                raise
            said = layers[origin[found.path]].shown(found)
            raise ValueError(f"{said}:{str(error).partition(':')[2]}") from None
    return RunConfig(kind, **parts)


def _check_phases(
    values: dict[str, Any], origin: dict[str, int], layers: Sequence[Layer], settings: Mapping[str, Setting]
) -> None:
    """Phases have their own learning rates and steps: what is said over them would have no effect."""
    phases = values.get("training.phases")
    if not phases:
        return
    made = origin["training.phases"]
    for path in ("training.lr", "training.end_lr"):
        if origin[path] > made:
            raise ValueError(
                f"{layers[origin[path]].shown(settings[path])}: expected a run without phases, since each has its own, "
                "got one with phases; change those, or take them away with training.phases = []"
            )
    if origin["training.steps"] < made:
        values["training.steps"] = sum(phase.steps for phase in phases)
        origin["training.steps"] = made


def _check_warmup(
    values: dict[str, Any], origin: dict[str, int], layers: Sequence[Layer], settings: Mapping[str, Setting]
) -> None:
    steps, warmup = values["training.steps"], values["training.warmup"]
    if origin["training.steps"] > origin["training.warmup"] and steps < warmup:
        layer = layers[origin["training.steps"]]
        less = f"warmup={max(steps, 0) // 10}"
        raise ValueError(
            f"{layer.shown(settings['training.steps'])}: expected at least the {warmup} steps of warm-up, got {steps}; "
            f"a shorter run needs a shorter one too, such as {'--set ' if layer.source == '--set' else ''}{less}"
        )


def continued(run: RunConfig, first: Config, source: str, layers: Sequence[Layer]) -> RunConfig:
    """The run with the sizes of the model `first`, which it begins with. A new decoder's own settings may differ, and
    what no weight depends on in a generator.

    Raises ValueError where a layer after the first says another size.
    """
    model: Any = first
    free = {"dropout", "class_dropout", "guidance_scale", "guidance_power"}
    if isinstance(run.model, TokenizerConfig) and isinstance(first, TokenizerConfig):
        free = {1: {"causal_decoder", "auxiliary_loss"}, 2: {"causal_decoder", "num_buffer_tokens"}}[run.model.stage]
        if first.stage == run.model.stage:
            free = set()
        else:
            model = dataclasses.replace(first, stage=run.model.stage, causal_decoder=None)
    chosen = {}
    for layer in layers[1:]:
        for path in layer.values:
            setting = settings_of(run.kind)[path]
            if setting.part != "model":
                continue
            value, there = getattr(run.model, setting.name), getattr(model, setting.name)
            if setting.name in free:
                chosen[setting.name] = value
            elif value != there:
                raise ValueError(f"{layer.shown(setting)}: expected {there}, as in {source}, got {value}")
    return dataclasses.replace(run, model=dataclasses.replace(model, **chosen))
