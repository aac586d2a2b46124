"""`alitok-fast train ...` and `alitok-fast tokenize`: parse, call, print. Mounted by alitok_fast/cli.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from alitok_fast.config import GeneratorConfig, TokenizerConfig, generator_preset, tokenizer_preset
from alitok_fast.data import open_source, validate_token_cache
from alitok_fast.device import check_device
from alitok_fast.models.loading import load_tokenizer
from alitok_fast.training.config import GENERATOR_PRESETS, TOKENIZER_PRESETS, TrainConfig
from alitok_fast.training.generator import train_generator
from alitok_fast.training.tokenize import tokenize
from alitok_fast.training.tokenizer import train_tokenizer

HELP = """Train the tokenizer (stages 1 and 2) and the generator.

\b
Examples:
  alitok-fast train tokenizer --stage 1 --data PHOTOS --out runs/stage1
  alitok-fast train tokenizer --stage 2 --stage1 runs/stage1/model --data PHOTOS --out runs/stage2
  alitok-fast train generator --cache runs/tokens --out runs/generator
"""
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=HELP)

Out = Annotated[Path, typer.Option(help="Run folder: config.json, log.jsonl, checkpoint/ and model/.")]
Data = Annotated[Path, typer.Option(help="Folder with IDX files (Fashion-MNIST), or of pictures (a folder per class).")]
OnError = Annotated[str, typer.Option(help="Unreadable pictures: 'stop' at them, or 'skip' them by name.")]
Preset = Annotated[str, typer.Option(help="Model sizes and training settings to start from.")]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP007, UP045 - typer reads this annotation at run time
    typer.Option("--set", help="Change a training setting, such as --set steps=1000 --set lr=1e-3; repeatable."),
]
Resume = Annotated[bool, typer.Option(help="Go on from the run folder's checkpoint.")]
TensorBoard = Annotated[bool, typer.Option(help="Also write TensorBoard files.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", callback=check_device)]
Progress = Annotated[bool, typer.Option(help="A progress bar; lines without a terminal.")]


def with_settings(config: TrainConfig, settings: list[str] | None) -> TrainConfig:
    """The configuration with `name=value` changes; ValueError names an unknown key or a value of another type."""
    changes = {}
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for setting in settings or []:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set: expected name=value, got {setting!r}")
        if name not in known:
            raise ValueError(f"--set: unknown setting {name!r}; expected one of {sorted(known)}")
        changes[name] = _parse(name, text, known[name])
    if "warmup" not in changes and changes.get("steps", config.warmup) < config.warmup:
        raise ValueError(
            f"--set steps: expected at least the {config.warmup} steps of warm-up, got {changes['steps']}; "
            f"a shorter run needs a shorter one too, such as --set warmup={max(changes['steps'], 0) // 10}"
        )
    return type(config).from_dict({**config.to_dict(), **changes})


def _parse(name: str, text: str, current: object) -> object:
    kind = type(current)
    try:
        if kind is tuple:
            values = json.loads(text)
            return tuple(float(v) for v in values)
        return kind(text)
    except (ValueError, TypeError):
        raise ValueError(f"--set {name}: expected a {kind.__name__} such as {current}, got {text!r}") from None


def _training_preset(presets: dict, name: str) -> TrainConfig:
    if name not in presets:
        raise ValueError(f"preset: expected one of {sorted(presets)}, got {name!r}")
    return presets[name]


@app.command("tokenizer")
def tokenizer_command(
    data: Data,
    out: Out,
    stage: Annotated[int, typer.Option(help="1: everything, causal decoder. 2: a new bidirectional decoder.")],
    stage1: Annotated[Optional[Path], typer.Option(help="Stage 2: the stage-1 model to start from.")] = None,  # noqa: UP045
    preset: Preset = "demo",
    set_: Settings = None,
    split: Annotated[str, typer.Option(help="IDX files: train or test.")] = "train",
    on_error: OnError = "stop",
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    device: Device = "cpu",
    progress: Progress = True,
) -> None:
    """Train the tokenizer.

    Example: alitok-fast train tokenizer --stage 1 --data /usr/share/datasets/fashion-mnist --out runs/stage1
    """
    model_config: TokenizerConfig = tokenizer_preset(preset)
    presets = TOKENIZER_PRESETS[stage] if stage in TOKENIZER_PRESETS else TOKENIZER_PRESETS[1]
    config = with_settings(_training_preset(presets, preset), set_)
    source = open_source(data, split, model_config.image_size, on_error)
    typer.echo(train_tokenizer(source, out, stage, model_config, config, stage1, device, resume, tensorboard, progress))


@app.command("generator")
def generator_command(
    cache: Annotated[Path, typer.Option(help="Token cache written by `alitok-fast tokenize`.")],
    out: Out,
    preset: Preset = "demo",
    set_: Settings = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    device: Device = "cpu",
    progress: Progress = True,
) -> None:
    """Train the generator on a token cache.

    Example: alitok-fast train generator --cache runs/tokens --out runs/generator --set precision=fp32
    """
    model_config: GeneratorConfig = generator_preset(preset)
    config = with_settings(_training_preset(GENERATOR_PRESETS, preset), set_)
    tokens = validate_token_cache(cache)
    typer.echo(train_generator(tokens, out, model_config, config, device, resume, tensorboard, progress))


def tokenize_command(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the token cache.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer: 'demo', a model folder or a checkpoint file.")] = "demo",
    crops: Annotated[int, typer.Option(help="1: centre, 2: and its mirror image, 10: with the corners too.")] = 10,
    split: Annotated[str, typer.Option(help="IDX files: train or test.")] = "train",
    batch_size: Annotated[int, typer.Option(help="Images encoded together.")] = 64,
    on_error: OnError = "stop",
    device: Device = "cpu",
    progress: Progress = True,
) -> None:
    """Encode every image of a data set once; an interrupted run is continued.

    Example: alitok-fast tokenize --data photos/ --out runs/tokens --tokenizer runs/stage1/model --crops 2
    """
    model = load_tokenizer(tokenizer, device, torch.float32)
    found = tokenize(
        model, open_source(data, split, model.config.image_size, on_error), out, crops, batch_size, progress
    )
    typer.echo(f"{out}: {found.meta.num_images} images x {found.meta.num_crops} crops x {found.meta.num_tokens} tokens")
