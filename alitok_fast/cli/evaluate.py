"""`alitok-fast evaluate ...`: the field's measures. Mounted by alitok_fast/cli/app.py; torch loads inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from alitok_fast.cli.data import SourceOptions
from alitok_fast.cli.evaluate_options import (
    DrawOptions,
    NetworkOptions,
    check_result,
    say_result,
    seeds_of,
    table,
    warnings,
    working_folder,
)
from alitok_fast.cli.evaluate_paper import paper
from alitok_fast.cli.evaluate_reconstruction import reconstruction
from alitok_fast.cli.options import BatchSize, MaybeInt, MaybePath, MaybeText, Progress, with_options
from alitok_fast.inference.params import SamplingParams

HELP = """Measure generated images and reconstructions, as the field does.

\b
Examples:
  alitok-fast evaluate samples xl.npz --reference VIRTUAL_imagenet256_labeled.npz --out fid.json
  alitok-fast evaluate samples --model DIR --num-images 50000 --seeds 0,1,2 --reference train.safetensors --out r.json
  alitok-fast evaluate reconstruction --data imagenet/ --tokenizer alitok_tokenizer.pth --out rfid.json
  alitok-fast evaluate reference --data PHOTOS --size 256 --out photos.safetensors
  alitok-fast evaluate difference before.json after.json
  alitok-fast evaluate paper --size b --model DIR --imagenet-val imagenet/val --adm-reference adm.npz --out b.json
"""
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=HELP)
app.command("reconstruction")(reconstruction)
app.command("paper")(paper)

Work = Annotated[
    MaybePath,
    typer.Option(help="Folder of features, which stays; if not given, one beside --out until that is written."),
]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that this command has not written.")]
DRAWING = (
    "dtype",
    "weights",
    "model",
    "tokenizer",
    "weight_dtype",
    "activation_dtype",
    "decode_dtype",
    "num_images",
    "per_class",
    "seeds",
)


@app.command("samples")
@with_options(load=DrawOptions, params=SamplingParams, networks=NetworkOptions)
def samples(
    context: typer.Context,
    load: Any,
    params: Any,
    networks: Any,
    reference: Annotated[
        list[Path],
        typer.Option(help="Statistics: ADM's .npz, torch-fidelity's .pt or our .safetensors; one for each network."),
    ],
    images: Annotated[
        Optional[list[Path]],  # noqa: UP045 - as typer reads it
        typer.Argument(help="Sets of images, each an .npz, .npy or folder of PNGs; without any, --model draws them."),
    ] = None,
    num_images: Annotated[
        MaybeInt, typer.Option(help="Images to draw, a multiple of the classes; published: 50000.", min=1)
    ] = None,
    per_class: Annotated[MaybeInt, typer.Option(help="Images to draw of each class.", min=1)] = None,
    seeds: Annotated[MaybeText, typer.Option(help="Several seeds, such as 0,1,2: a set of images for each.")] = None,
    out: Annotated[MaybePath, typer.Option(help="JSON file of the result.")] = None,
    work: Work = None,
    force: Force = False,
    batch_size: BatchSize = 32,
    progress: Progress = True,
) -> None:
    """FID, sFID, Inception Score, KID, precision and recall, as the ADM suite and torch-fidelity define them, and the
    same distances in the features of other networks.

    Several sets of images, or seeds, give the mean and its 95% interval. What is drawn are the images of `alitok-fast
    sample` with the same settings; no picture is kept. A killed run goes on when the same command is given again.

    \b
    Examples:
      alitok-fast evaluate samples xl.npz --reference VIRTUAL_imagenet256_labeled.npz --out fid.json
      alitok-fast evaluate samples a.npz b.npz c.npz --reference train.safetensors --work features/
      alitok-fast evaluate samples pictures/ --network dinov2_vitb14 --reference dino.safetensors
      alitok-fast evaluate samples --model DIR --num-images 50000 --seeds 0,1,2 --reference adm.npz --out r.json
      torchrun --nproc-per-node 8 -m alitok_fast.cli evaluate samples xl.npz --reference adm.npz --out r.json
    """
    from alitok_fast.evaluation.image_sets import StoredImages
    from alitok_fast.evaluation.reference import read_reference
    from alitok_fast.pipelines.bulk import balanced_labels, first_says, process_group
    from alitok_fast.pipelines.sample_evaluation import FORMAT, drawn_images, measure_samples, paired
    from alitok_fast.storage.files import write_json

    check_result(out, FORMAT, force)
    _check_drawing(context, bool(images), num_images, per_class)
    wanted = _seeds(context, seeds, params)
    with process_group() as (rank, world):
        files = first_says(lambda: [read_reference(path, "--reference") for path in reference], rank, world)
        pairs = paired(networks.load(load.device), files)
        sets: Any
        if images:
            sets = first_says(lambda: [StoredImages.open(path, batch_size) for path in images], rank, world)
        else:
            pipe = load.pipeline()
            labels = balanced_labels(range(len(pipe.classes)), num_images, per_class)
            sets = drawn_images(pipe, labels, params, wanted, batch_size)
        with working_folder(work, out, rank, world) as folder:
            result = measure_samples(sets, pairs, folder, batch_size, rank, world, progress)
            if result is not None and out is not None:
                write_json(out, result)
    if result is not None:
        say_result(table(result), out)


@app.command("reference")
@with_options(source=SourceOptions, networks=NetworkOptions)
def reference(
    source: Any,
    networks: Any,
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    size: Annotated[
        MaybeInt, typer.Option(help="Side in pixels of ADM's centre crop. Images of an .npz or .npy stay as they are.")
    ] = None,
    images_for_precision: Annotated[
        int, typer.Option(help="Evenly spaced images whose features are kept for precision, recall and KID.", min=0)
    ] = 10_000,
    orientation: Annotated[bool, typer.Option(help="Turn pictures as their EXIF data say.")] = False,
    profile: Annotated[bool, typer.Option(help="Convert the colours of pictures with a profile to sRGB.")] = False,
    on_error: Annotated[
        str, typer.Option(help="Unreadable pictures: 'stop' at them, or 'skip' them by name.")
    ] = "stop",
    workers: Annotated[
        MaybeInt, typer.Option(help="Threads that read pictures; one per core, at most 8, if not given.", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    work: Work = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    batch_size: BatchSize = 32,
    progress: Progress = True,
) -> None:
    """Write the statistics of real images in a network's features, with all that could change them.

    --data is anything that training reads, or an .npz or .npy of images. Pictures are read as the published preparation
    reads them: EXIF orientation and colour profiles ignored, JPEGs decoded whole.

    \b
    Examples:
      alitok-fast evaluate reference --data imagenet/train --size 256 --device cuda --out imagenet256.safetensors
      alitok-fast evaluate reference --data adm.npz --network dinov2_vitb14 --out dino.safetensors
      alitok-fast evaluate reference --data photos/ --size 64 --network efficientnet_lite0 --out photos.safetensors
    """
    from alitok_fast.data.reading import default_workers
    from alitok_fast.evaluation.image_sets import ARRAYS, CroppedImages, StoredImages
    from alitok_fast.evaluation.reference import write_reference
    from alitok_fast.pipelines.bulk import first_says, process_group
    from alitok_fast.pipelines.reference_statistics import reference_statistics

    if out.suffix != ".safetensors":
        raise ValueError(f"out: expected a file ending in .safetensors, got {out}")
    if out.exists() and not force:
        raise ValueError(f"out: {out} is there; choose another or --force")
    if len(networks.names) > 1:
        raise ValueError(f"network: expected one, got {', '.join(networks.names)}")
    array = Path(source.data)
    stored = array.suffix.lower() in ARRAYS and array.is_file()
    if stored == (size is not None):
        raise ValueError(f"size: expected {'nothing, since arrays stay as they are' if stored else 'a size in pixels'}")
    with process_group() as (rank, world):
        images: Any
        if stored:
            images = first_says(lambda: StoredImages.open(array, batch_size, argument="data"), rank, world)
        else:
            pictures = source.open(
                typer.echo if rank == 0 else lambda line: None,
                image_size=size,
                apply_orientation=orientation,
                convert_profile=profile,
                draft=False,
                on_error=on_error,
            )
            reading = f"EXIF orientation {_applied(orientation)}, colour profiles {_applied(profile)}, JPEGs whole"
            images = CroppedImages(pictures, size or 0, batch_size, workers or default_workers(), reading)
        (network,) = networks.load(device)
        with working_folder(work, out, rank, world) as folder:
            made = reference_statistics(images, network, folder, images_for_precision, rank, world, progress)
            if made is not None:
                write_reference(out, made)
    if made is not None:
        kept = 0 if made.vectors is None else len(made.vectors)
        typer.echo(f"wrote {out}: {images.count:,} images in {network.name}, single features of {kept:,}")


@app.command("difference")
def difference(
    first: Annotated[Path, typer.Argument(help="Result of `evaluate samples`.")],
    second: Annotated[Path, typer.Argument(help="Result to compare with it.")],
) -> None:
    """Say of two results, measure by measure, whether chance may have made the difference.

    Student's 95% interval of the difference of the means over seeds: at least one result needs several. What else the
    results differ in, but for the images, is warned of.

    \b
    Example:
      alitok-fast evaluate difference before.json after.json
    """
    from alitok_fast.pipelines.result_difference import differences_between

    rows, doubts = differences_between(first, second)
    width = max(len(row.measure) for row in rows)
    for row in rows:
        half = "" if row.half is None else f" +- {row.half:.3g} (95%)"
        values = f"{row.first:.6g} -> {row.second:.6g}: {row.difference:+.3g}{half}"
        typer.echo(f"{row.measure:{width}}  {values}, {row.verdict}")
    for line in warnings(doubts):
        typer.echo(line)


def _applied(flag: bool) -> str:
    return "applied" if flag else "ignored"


def _check_drawing(context: typer.Context, stored: bool, num_images: int | None, per_class: int | None) -> None:
    """That drawing is asked for as a whole, or not at all."""
    if not stored:
        if num_images is None and per_class is None:
            raise ValueError("num_images: expected a number (or --per-class, or files of images), got none")
        return
    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE" and (name in DRAWING or hasattr(SamplingParams(), name)):
            raise ValueError(f"{name}: expected none, since the images are given and nothing is drawn")


def _seeds(context: typer.Context, seeds: str | None, params: Any) -> list[int]:
    if seeds is None:
        return [params.seed]
    given = context.get_parameter_source("seed")
    if given is not None and given.name == "COMMANDLINE":
        raise ValueError("seeds: expected --seeds or --seed, got both")
    return seeds_of(seeds)
