"""`alitok-fast train ...` and `alitok-fast tokenize`: parse, call, print. Mounted by alitok_fast/cli/app.py.

torch loads inside the commands, so that help is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from alitok_fast.cli.data import NO_SPLITS, SourceOptions, first_split
from alitok_fast.cli.options import MaybeInt, MaybeText, Progress, with_options
from alitok_fast.cli.run_options import RunOptions, given_layer
from alitok_fast.training.run_config import combine
from alitok_fast.training.run_layers import Layer, preset_layer, preset_names, stage_of
from alitok_fast.training.run_settings import (
    KINDS,
    GeneratorStart,
    GeneratorWatch,
    PictureData,
    TokenData,
    TokenizerStart,
    TokenizerWatch,
    nearest,
)

HELP = """Train the tokenizer (stages 1 and 2) and the generator.

\b
Examples:
  alitok-fast train tokenizer --stage 1 --data PHOTOS --out runs/stage1
  alitok-fast train tokenizer --stage 2 --stage1 runs/stage1/model --data PHOTOS --out runs/stage2
  alitok-fast train generator --cache runs/tokens --out runs/generator
  alitok-fast train generator --out runs/generator --resume --set steps=8000
  alitok-fast train presets --show 256 > run.toml
  alitok-fast train tokenizer --config run.toml --data PHOTOS --out runs/own
"""
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=HELP)
PLACES = ("skip_list", "root", "labels", "class_names", "image_column", "label_column", "index_folder")


def _device(name: str) -> str:
    from alitok_fast.device import check_device

    return check_device(name)


Out = Annotated[Path, typer.Option(help="Run folder: config.json, run.toml, log.jsonl, checkpoint/ and model/.")]
OnError = Annotated[str, typer.Option(help="Unreadable pictures: 'stop' at them, or 'skip' them by name.")]
Orientation = Annotated[bool, typer.Option(help="Turn pictures as their EXIF data say, as viewers do.")]
Profile = Annotated[bool, typer.Option(help="Convert the colours of pictures with a colour profile to sRGB.")]
Draft = Annotated[bool, typer.Option(help="Decode large JPEGs at a reduced size that is enough, which is faster.")]
Workers = Annotated[MaybeInt, typer.Option(help="Threads that read pictures; one per core, at most 8, if not given.")]
Force = Annotated[bool, typer.Option(help="Write over what --out holds already.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", callback=_device)]


@app.command("tokenizer")
@with_options(options=RunOptions, start=TokenizerStart, data=PictureData, watch=TokenizerWatch)
def tokenizer_command(
    context: typer.Context,
    out: Out,
    options: Any,
    start: Any,
    data: Any,
    watch: Any,
    stage: Annotated[
        MaybeInt, typer.Option(help="1: everything, causal decoder. 2: a new bidirectional decoder.")
    ] = None,
) -> None:
    """Train the tokenizer.

    \b
    Examples:
      alitok-fast train tokenizer --stage 1 --data /usr/share/datasets/fashion-mnist --out runs/stage1
      alitok-fast train tokenizer --out runs/stage1 --resume
      alitok-fast train tokenizer --config run.toml --set model.prefix_tokens=16 --out runs/own
    """
    from alitok_fast.data import open_source
    from alitok_fast.data.checks import require_count
    from alitok_fast.training.tokenizer import train_tokenizer

    kept, run = options.run(
        "tokenizer", out, given_layer(context, "tokenizer", stage, start=start, data=data, watch=watch)
    )
    read: Any = run.data
    if read.workers is not None:
        require_count("workers", read.workers, least=0)
    if read.path is None:
        raise ValueError("data: expected --data, or path in [data] of the run file, got none")
    size = run.model.image_size
    how = read.on_error, read.orientation, read.profile
    places = {name: getattr(read, name) for name in PLACES}
    source = open_source(read.path, read.split, size, *how, typer.echo, read.draft, **places)
    held_out = _held_out(read, run.watch, size) if run.training.evaluate_every else None
    model = train_tokenizer(
        source,
        out,
        run.model.stage,
        run.model,
        run.training,
        run.start.stage1,
        options.device,
        options.resume,
        run.watch.tensorboard,
        options.progress,
        read.workers,
        options.force,
        run.start.init,
        kept.to_toml(),
        held_out,
        run.watch.evaluate_network,
        run.watch.evaluate_weights,
    )
    typer.echo(model)


def _held_out(read: Any, watch: Any, size: int) -> Any:
    """The pictures that a tokenizer is evaluated with, read as `evaluate reconstruction` reads them: those of another
    folder, or of another split of the run's own data."""
    from alitok_fast.data.sources import HELD_OUT, open_source

    own = watch.evaluate_data is None
    path, places = (read.path, {name: getattr(read, name) for name in PLACES[1:]}) if own else (watch.evaluate_data, {})
    splits = [split for split in HELD_OUT if split != read.split] if own else [*HELD_OUT, NO_SPLITS]
    how = size, read.on_error, False, False, typer.echo, False
    try:
        return first_split(
            [watch.evaluate_split] if watch.evaluate_split else splits,
            lambda split: open_source(path, split, *how, **places),
        )
    except ValueError as error:
        other = "; --evaluate-data names others" if own else ""
        raise ValueError(f"evaluate_data: expected held-out pictures, got none ({error}){other}") from None


@app.command("generator")
@with_options(options=RunOptions, start=GeneratorStart, data=TokenData, watch=GeneratorWatch)
def generator_command(context: typer.Context, out: Out, options: Any, start: Any, data: Any, watch: Any) -> None:
    """Train the generator on a token cache.

    \b
    Examples:
      alitok-fast train generator --cache runs/tokens --out runs/generator --set precision=fp32
      alitok-fast train generator --out runs/generator --resume --set steps=8000
    """
    from alitok_fast.data import validate_token_cache
    from alitok_fast.training.generator import train_generator

    kept, run = options.run("generator", out, given_layer(context, "generator", start=start, data=data, watch=watch))
    if run.data.cache is None:
        raise ValueError("cache: expected --cache, or cache in [data] of the run file, got none")
    tokens = validate_token_cache(run.data.cache)
    typer.echo(tokens.summary)
    model = train_generator(
        tokens,
        out,
        run.model,
        run.training,
        options.device,
        options.resume,
        run.watch.tensorboard,
        options.progress,
        options.force,
        run.data.workers,
        run.start.init,
        run.watch.tokenizer,
        kept.to_toml(),
        run.watch.reference,
        run.watch.evaluate_weights,
        run.watch.evaluate_guidance,
    )
    typer.echo(model)


@app.command("presets")
def presets_command(
    show: Annotated[MaybeText, typer.Option(help="Print this preset as a run file.")] = None,
    kind: Annotated[MaybeText, typer.Option(help="tokenizer or generator, where both have such a preset.")] = None,
    stage: Annotated[MaybeInt, typer.Option(help="Of a tokenizer: 1 or 2.")] = None,
) -> None:
    """List the presets, or print one as a run file to save, edit and run.

    \b
    Examples:
      alitok-fast train presets
      alitok-fast train presets --show 256 --stage 1 > run.toml
      alitok-fast train presets --show demo --kind generator
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected tokenizer or generator, got {kind!r}")
    kinds = [one for one in KINDS if kind in (None, one)]
    if show is None:
        for one in kinds:
            typer.echo(f"{one}: {', '.join(preset_names(one))}")
        return
    having = [one for one in kinds if show in preset_names(one)]
    if not having:
        raise ValueError(f"show: unknown preset {show!r}; {nearest(show, [n for k in kinds for n in preset_names(k)])}")
    if len(having) > 1 and stage is not None:
        having = ["tokenizer"]
    if len(having) > 1:
        raise ValueError(f"kind: expected --kind tokenizer or --kind generator, since both have {show!r}, got none")
    if stage is not None and having != ["tokenizer"]:
        raise ValueError(f"stage: expected none of a generator, got {stage}")
    chosen = stage_of([Layer("", {"model.stage": stage})]) if stage is not None else None
    layer = preset_layer(having[0], {"model": show, "training": show}, chosen)
    typer.echo(combine(having[0], [layer]).to_toml(), nl=False)


@with_options(source=SourceOptions)
def tokenize_command(
    source: Any,
    out: Annotated[Path, typer.Option(help="Folder of the token cache.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer: 'demo', a model folder or a checkpoint file.")] = "demo",
    crops: Annotated[int, typer.Option(help="1: centre, 2: and its mirror image, 10: with the corners too.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images encoded together.")] = 64,
    on_error: OnError = "stop",
    orientation: Orientation = True,
    profile: Profile = True,
    draft: Draft = True,
    workers: Workers = None,
    force: Force = False,
    device: Device = "cpu",
    progress: Progress = True,
    encode_dtype: Annotated[
        MaybeText,
        typer.Option(help="Precision of the encoder: float32, bfloat16, float16 or, on a CPU, int8."),
    ] = None,
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

    from alitok_fast.data.cache_shards import parse_shard
    from alitok_fast.data.checks import require_choice, require_count
    from alitok_fast.data.transforms import CROP_COUNTS
    from alitok_fast.device import local_device
    from alitok_fast.models.loading import dtype_from_name, load_tokenizer
    from alitok_fast.pipelines.bulk import process_group
    from alitok_fast.training.ranks import Ranks
    from alitok_fast.training.tokenize import tokenize

    part = None if shard is None else parse_shard(shard)
    precision = dtype_from_name(encode_dtype, "encode_dtype")
    require_count("batch_size", batch_size)
    require_choice("crops", crops, CROP_COUNTS)
    if workers is not None:
        require_count("workers", workers)
    with process_group() as (rank, world):
        say: Callable[[str], object] = typer.echo if rank == 0 else lambda line: None
        model = load_tokenizer(tokenizer, local_device(device), torch.float32)
        how = dict(on_error=on_error, apply_orientation=orientation, convert_profile=profile, draft=draft)
        pictures = source.open(say, image_size=model.config.image_size, **how)
        ranks = Ranks(rank, world)
        found = tokenize(model, pictures, out, crops, batch_size, progress, workers, force, part, ranks, precision).meta
    say(f"{out}: {found.num_images} images x {found.num_crops} crops x {found.num_tokens} tokens")
