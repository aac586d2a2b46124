"""`alitok-fast train ...` and `alitok-fast tokenize`: parse, call, print. Mounted by alitok_fast/cli/app.py.

torch loads inside the commands, so that help is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from alitok_fast.cli.options import MaybeInt, MaybePath, MaybeText, Progress, option, with_options
from alitok_fast.config import GeneratorConfig, TokenizerConfig, generator_preset, tokenizer_preset
from alitok_fast.training.config import (
    GENERATOR_PRESETS,
    TOKENIZER_PRESETS,
    GeneratorTrainConfig,
    TokenizerTrainConfig,
    TrainConfig,
)

HELP = """Train the tokenizer (stages 1 and 2) and the generator.

\b
Examples:
  alitok-fast train tokenizer --stage 1 --data PHOTOS --out runs/stage1
  alitok-fast train tokenizer --stage 2 --stage1 runs/stage1/model --data PHOTOS --out runs/stage2
  alitok-fast train generator --cache runs/tokens --out runs/generator
  alitok-fast train generator --cache runs/tokens --out runs/generator --resume --set steps=8000
"""
Settable = TypeVar("Settable", bound=TrainConfig)
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=HELP)


def _device(name: str) -> str:
    from alitok_fast.device import check_device

    return check_device(name)


Out = Annotated[Path, typer.Option(help="Run folder: config.json, log.jsonl, checkpoint/ and model/.")]
Data = Annotated[
    Path, typer.Option(help="Folder with IDX files (Fashion-MNIST), or of pictures (one folder per class).")
]
Split = Annotated[str, typer.Option(help="IDX files: train or test. Pictures: a folder in DATA, such as val.")]
OnError = Annotated[str, typer.Option(help="Unreadable pictures: 'stop' at them, or 'skip' them by name.")]
Orientation = Annotated[bool, typer.Option(help="Turn pictures as their EXIF data say, as viewers do.")]
Profile = Annotated[bool, typer.Option(help="Convert the colours of pictures with a colour profile to sRGB.")]
Workers = Annotated[MaybeInt, typer.Option(help="Threads that read pictures; one per core, at most 8, if not given.")]
Force = Annotated[bool, typer.Option(help="Write over what --out holds already.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", callback=_device)]


def with_settings(config: Settable, settings: list[str] | None) -> Settable:
    """The configuration with `name=value` changes; ValueError names an unknown key or a value of another type."""
    changes: dict[str, Any] = {}
    known: dict[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
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


def _parse(name: str, text: str, current: Any) -> Any:
    kind: Any = type(current)
    try:
        if kind is tuple:  # 0.9,0.95 with or without brackets
            return tuple(float(part) for part in text.strip().strip("()[]").split(","))
        return kind(text)
    except ValueError:
        what = {int: "a whole number", float: "a number", tuple: "numbers"}[kind]
        shown = ",".join(map(str, current)) if kind is tuple else current
        raise ValueError(f"--set {name}: expected {what} such as {shown}, got {text!r}") from None


def _training_preset(presets: dict[str, Settable], name: str) -> Settable:
    if name not in presets:
        raise ValueError(f"preset: expected one of {sorted(presets)}, got {name!r}")
    return presets[name]


@dataclass(frozen=True)
class RunOptions:
    """How a run begins or goes on, and what it shows: options of both kinds of training."""

    preset: str | None = option(None, "Model sizes and training settings to start from; 'demo' if not given.")
    set_: list[str] | None = option(
        None, "Change a training setting, such as --set steps=1000 --set lr=1e-3; repeatable.", "--set"
    )
    resume: bool = option(
        False, "Go on from the run folder's checkpoint, with its settings; --set steps=N extends the run."
    )
    force: bool = option(False, "Write over what --out holds already.")
    tensorboard: bool = option(False, "Also write TensorBoard files.")
    device: str = option("cpu", "cpu, cuda or cuda:N.")
    progress: bool = option(True, "Show a progress bar, or lines where there is no terminal.")

    def saved(self, out: Path, kind: str, train: Any, model: Any) -> tuple[str, Any, Any] | None:
        """The kind, the training settings and the model's sizes of the run in `out` to go on with; None without one."""
        from alitok_fast.training.run_folder import read_settings

        _device(self.device)
        saved = read_settings(out) if self.resume else None
        if saved is None:
            return None
        if not saved["kind"].startswith(kind):
            raise ValueError(f"out: expected the run of a {kind}, got {saved['kind']!r} in {out}")
        try:
            return saved["kind"], train.from_dict(saved["train"]), model.from_dict(saved["model"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{out / 'config.json'}: {error}") from None

    def settings(
        self, saved: tuple[str, Any, Any] | None, training: dict[str, Settable], sizes: Callable[[str], Any]
    ) -> tuple[Settable, Any]:
        """The training settings and the model's sizes: of the run that is `saved`, else of the preset, with --set."""
        name = self.preset or "demo"
        model = sizes(name)
        config = _training_preset(training, name)
        if saved is not None:
            config, model = saved[1], saved[2] if self.preset is None else model
        return with_settings(config, self.set_), model


@app.command("tokenizer")
@with_options(options=RunOptions)
def tokenizer_command(
    data: Data,
    out: Out,
    options: Any,
    stage: Annotated[
        MaybeInt, typer.Option(help="1: everything, causal decoder. 2: a new bidirectional decoder.")
    ] = None,
    stage1: Annotated[MaybePath, typer.Option(help="Stage 2: the stage-1 model to start from.")] = None,
    split: Split = "train",
    on_error: OnError = "stop",
    orientation: Orientation = True,
    profile: Profile = True,
    workers: Workers = None,
) -> None:
    """Train the tokenizer.

    \b
    Examples:
      alitok-fast train tokenizer --stage 1 --data /usr/share/datasets/fashion-mnist --out runs/stage1
      alitok-fast train tokenizer --data /usr/share/datasets/fashion-mnist --out runs/stage1 --resume
    """
    from alitok_fast.data import open_source
    from alitok_fast.data.checks import require_count
    from alitok_fast.training.tokenizer import train_tokenizer

    if workers is not None:
        require_count("workers", workers)
    run = options.saved(out, "tokenizer", TokenizerTrainConfig, TokenizerConfig)
    if run is not None and stage is None:
        stage = int(run[0][-1])
    if stage is None:
        raise ValueError("stage: expected --stage 1 or --stage 2, got none")
    presets = TOKENIZER_PRESETS.get(stage, TOKENIZER_PRESETS[1])
    config, model_config = options.settings(run, presets, tokenizer_preset)
    source = open_source(data, split, model_config.image_size, on_error, orientation, profile, typer.echo)
    model = train_tokenizer(
        source,
        out,
        stage,
        model_config,
        config,
        stage1,
        options.device,
        options.resume,
        options.tensorboard,
        options.progress,
        workers,
        options.force,
    )
    typer.echo(model)


@app.command("generator")
@with_options(options=RunOptions)
def generator_command(
    cache: Annotated[Path, typer.Option(help="Token cache written by `alitok-fast tokenize`.")],
    out: Out,
    options: Any,
) -> None:
    """Train the generator on a token cache.

    \b
    Examples:
      alitok-fast train generator --cache runs/tokens --out runs/generator --set precision=fp32
      alitok-fast train generator --cache runs/tokens --out runs/generator --resume --set steps=8000
    """
    from alitok_fast.data import validate_token_cache
    from alitok_fast.training.generator import train_generator

    run = options.saved(out, "generator", GeneratorTrainConfig, GeneratorConfig)
    config, model_config = options.settings(run, GENERATOR_PRESETS, generator_preset)
    tokens = validate_token_cache(cache)
    typer.echo(tokens.summary)
    model = train_generator(
        tokens,
        out,
        model_config,
        config,
        options.device,
        options.resume,
        options.tensorboard,
        options.progress,
        options.force,
    )
    typer.echo(model)


def tokenize_command(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the token cache.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer: 'demo', a model folder or a checkpoint file.")] = "demo",
    crops: Annotated[int, typer.Option(help="1: centre, 2: and its mirror image, 10: with the corners too.")] = 10,
    split: Split = "train",
    batch_size: Annotated[int, typer.Option(help="Images encoded together.")] = 64,
    on_error: OnError = "stop",
    orientation: Orientation = True,
    profile: Profile = True,
    workers: Workers = None,
    force: Force = False,
    device: Device = "cpu",
    progress: Progress = True,
    shard: Annotated[
        MaybeText, typer.Option(help="I/N: write the I-th of N shards, for `alitok-fast tokens merge`.")
    ] = None,
) -> None:
    """Encode every image of a data set once; an interrupted run is continued.

    \b
    Examples:
      alitok-fast tokenize --data photos/ --out runs/tokens --tokenizer runs/stage1/model --crops 2
      alitok-fast tokenize --data photos/ --out runs/tokens-2 --shard 2/8
      torchrun --nproc-per-node 8 -m alitok_fast.cli tokenize --data photos/ --out runs/tokens --device cuda
    """
    import torch

    from alitok_fast.data import open_source
    from alitok_fast.data.checks import require_choice, require_count
    from alitok_fast.data.shards import parse_shard
    from alitok_fast.data.transforms import CROP_COUNTS
    from alitok_fast.device import local_device
    from alitok_fast.models.loading import load_tokenizer
    from alitok_fast.pipelines.bulk import process_group
    from alitok_fast.training.ranks import Ranks
    from alitok_fast.training.tokenize import tokenize

    part = None if shard is None else parse_shard(shard)
    require_count("batch_size", batch_size)
    require_choice("crops", crops, CROP_COUNTS)
    if workers is not None:
        require_count("workers", workers)
    with process_group() as (rank, world):
        say: Callable[[str], object] = typer.echo if rank == 0 else lambda line: None
        model = load_tokenizer(tokenizer, local_device(device), torch.float32)
        source = open_source(data, split, model.config.image_size, on_error, orientation, profile, say)
        found = tokenize(model, source, out, crops, batch_size, progress, workers, force, part, Ranks(rank, world)).meta
    say(f"{out}: {found.num_images} images x {found.num_crops} crops x {found.num_tokens} tokens")
