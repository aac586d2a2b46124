"""Options of both kinds of training, and the run that they make with presets and run files. torch loads inside."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from alitok_fast.cli.options import option
from alitok_fast.training.run_config import RUN_FILE, RunConfig, combine, continued
from alitok_fast.training.run_layers import (
    Layer,
    preset_layer,
    presets_of,
    read_run_file,
    saved_layer,
    set_layer,
    stage_of,
)
from alitok_fast.training.run_settings import absolute, settings_of


@dataclass(frozen=True)
class RunOptions:
    """How a run begins or goes on: options of both kinds of training."""

    config: str | None = option(None, "Run file (TOML) with any of the settings; --set and options override it.")
    preset: str | None = option(None, "Model sizes and training settings to start from; 'demo' if not given.")
    set_: list[str] | None = option(
        None, "Change a setting, such as --set steps=1000 --set model.width=512; repeatable.", "--set"
    )
    resume: bool = option(
        False, "Go on from the run folder's checkpoint, with its settings; --set steps=N extends the run."
    )
    force: bool = option(False, "Write over what --out holds already.")
    device: str = option("cpu", "cpu, cuda or cuda:N.")
    progress: bool = option(True, "Show a progress bar, or lines where there is no terminal.")

    def run(self, kind: str, out: Path, given: Layer) -> tuple[RunConfig, RunConfig]:
        """The settings of the run in `out`: as they are kept, and as it is begun or goes on with them.

        A run that goes on has the weights it began with in its checkpoint, and needs no others.
        """
        from alitok_fast.device import check_device
        from alitok_fast.training.run_folder import STATE_NAME

        check_device(self.device)
        layers = [*self._before(kind, out), set_layer(kind, self.set_ or []), given]
        stage = stage_of(layers)
        if kind == "tokenizer" and stage is None:
            raise ValueError("stage: expected --stage 1 or --stage 2, got none")
        layers = [preset_layer(kind, presets_of(layers), stage), *layers]
        run = combine(kind, layers)
        if not (self.resume and (out / STATE_NAME).exists()):
            run = _begun(run, layers)
            return run, run
        said = {path for layer in layers[-2:] for path in layer.values}
        start: dict[str, Any] = {
            s.name: None for s in settings_of(kind).values() if s.part == "start" and s.path not in said
        }
        return run, dataclasses.replace(run, start=dataclasses.replace(run.start, **start))

    def _before(self, kind: str, out: Path) -> list[Layer]:
        """What --set and options override: the run file, or the settings of the run that goes on, or the preset."""
        from alitok_fast.training.run_folder import read_settings

        saved = read_settings(out) if self.resume else None
        if saved is not None and not saved["kind"].startswith(kind):
            raise ValueError(f"out: expected the run of a {kind}, got {saved['kind']!r} in {out}")
        layers = []
        if self.config is not None:
            layers = [read_run_file(self.config, kind)]
        elif saved is not None and (out / RUN_FILE).exists():
            layers = [read_run_file(out / RUN_FILE, kind)]
        elif saved is not None:
            layers = [saved_layer(out, kind, saved["train"], saved["model"])]
        if self.preset is None:
            return layers
        own = {path for path, setting in settings_of(kind).items() if setting.part in ("model", "training")}
        for layer in layers:
            if own <= {*layer.values, "model.init", "model.stage1"}:
                raise ValueError(f"preset: expected none, since {layer.source} has every setting, got {self.preset!r}")
        return [*layers, Layer("--preset", presets={"model": self.preset, "training": self.preset})]


def _begun(run: RunConfig, layers: list[Layer]) -> RunConfig:
    """The run with the sizes of the model that it begins with, where there is one."""
    from alitok_fast.models.loading import open_checkpoint

    source = run.start.init or getattr(run.start, "stage1", None)
    return run if source is None else continued(run, open_checkpoint(run.kind, source).config, source, layers)


def given_layer(context: typer.Context, kind: str, stage: int | None = None, **parts: Any) -> Layer:
    """The settings that options name on this command line; what has its default value is not said."""
    values: dict[str, Any] = {} if stage is None else {"model.stage": stage}
    for path, setting in settings_of(kind).items():
        source = context.get_parameter_source(setting.name) if setting.part in parts else None
        if source is not None and source.name == "COMMANDLINE":
            value = getattr(parts[setting.part], setting.name)
            values[path] = absolute(setting, value, Path.cwd()) if setting.is_path else value
    return Layer("", values)
