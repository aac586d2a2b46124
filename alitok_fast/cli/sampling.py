"""`alitok-fast sample`, `complete` and `watch`: class labels to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alitok_fast.cli.options import (
    BatchSize,
    Force,
    LoadOptions,
    MaybeInt,
    MaybePath,
    MaybeText,
    MaybeTexts,
    Progress,
    check_picture,
    with_options,
    write_metadata,
)
from alitok_fast.inference.params import SamplingParams

GRID_IMAGES = 1000
Photos = Annotated[list[Path], typer.Argument(help="Picture files.")]
Labels = Annotated[list[str], typer.Argument(help="Classes, by number or name.")]


@with_options(load=LoadOptions, params=SamplingParams)
def sample(
    load: Any,
    params: Any,
    labels: Annotated[MaybeTexts, typer.Argument(help="Classes by number or name, each once; all without.")] = None,
    out: Annotated[MaybePath, typer.Option(help="Folder for PNGs, or a file ending in .npz (ADM's format).")] = None,
    grid_file: Annotated[
        MaybePath, typer.Option("--grid", help="One picture of all images, class after class.")
    ] = None,
    per_class: Annotated[MaybeInt, typer.Option(help="Images of each class; 1 if nothing else is said.", min=1)] = None,
    num_images: Annotated[
        MaybeInt, typer.Option(help="Total number of images, a multiple of the classes.", min=1)
    ] = None,
    batch_size: BatchSize = 32,
    force: Force = False,
    progress: Progress = True,
) -> None:
    """Sample pictures of classes; settings, precision and versions are written beside them as JSON.

    \b
    Examples:
      alitok-fast sample --per-class 8 --grid garments.png
      alitok-fast sample bag "ankle boot" 3 --seed 7 --out pictures/
      torchrun --nproc-per-node 8 -m alitok_fast.cli sample --model DIR --num-images 50000 --out xl.npz --device cuda

    The classes take turns: image i of --out has class i modulo their number, in the order in which they are given.
    A killed run with --out goes on when the same command is given again.
    """
    if out is None and grid_file is None:
        raise ValueError("expected --out, --grid or both, got neither")
    if grid_file is not None:
        check_picture(grid_file, force)
    from alitok_fast.pipelines.bulk import BulkRun, balanced_labels, only_writer, process_group
    from alitok_fast.progress import Bar
    from alitok_fast.storage.images import check_image_name, grid, grid_size, write_image

    with process_group() as (rank, world):
        pipe = load.pipeline()
        classes = pipe.classes.ids(labels or range(len(pipe.classes)))
        ids = balanced_labels(classes, num_images, per_class)
        columns = len(ids) // len(classes) if len(ids) > len(classes) else min(10, len(ids))
        if grid_file is not None:
            if len(ids) > GRID_IMAGES:
                raise ValueError(f"--grid: expected at most {GRID_IMAGES} images, got {len(ids)}")
            side = pipe.tokenizer.config.image_size
            size = grid_size(len(ids), columns, (side, side), ["label"] * len(ids))
            check_image_name(grid_file, size, "--grid")
        run = None
        if out is not None:
            with only_writer(out, rank):
                run = BulkRun(pipe, ids, out, params, batch_size, rank, world)
                title = "sampling" if world == 1 else f"sampling, process 1 of {world}"
                with Bar(title, run.share, enabled=progress and rank == 0) as bar:
                    run.sample(lambda n: bar.advance(by=n))
                run.finish()
        if rank:
            return
    if out is not None:
        typer.echo(f"{len(ids)} images in {out}")
    if grid_file is None:
        return
    order = [i for first in range(len(classes)) for i in range(first, len(ids), len(classes))]  # class after class
    shown = [ids[i] for i in order]
    if run is None:
        with Bar("sampling", len(ids), enabled=progress) as bar:
            options = dict(batch_size=batch_size, image_ids=order, on_batch=lambda n: bar.advance(by=n))
            samples = pipe(shown, params, **options)
        pictures, metadata = samples.pixels, samples.metadata
    else:
        pictures, metadata = run.pictures(order), {**run.manifest, "labels": shown, "image_ids": order}
    write_image(grid_file, grid(pictures, columns, [pipe.classes[label] for label in shown]))
    write_metadata(grid_file, metadata)


@with_options(load=LoadOptions, params=SamplingParams)
def complete(
    photos: Photos,
    label: Annotated[str, typer.Option(help="Class to complete them as, by number or name.")],
    out: Annotated[Path, typer.Option(help="Picture to write: photograph, what is given, completions.")],
    load: Any,
    params: Any,
    rows: Annotated[MaybeInt, typer.Option(help="Rows of patches to keep; half of them if not given.", min=0)] = None,
    variants: Annotated[int, typer.Option(help="Completions of each photograph.", min=1)] = 3,
    force: Force = False,
) -> None:
    """Keep the upper part of photographs and let the generator complete them.

    \b
    Examples:
      alitok-fast complete photo.jpg --label "ankle boot" --out completed.png
      alitok-fast complete cat.jpg --model b.bin --tokenizer tokenizer.pth --label 281 --rows 6 --out cats.png
    """
    check_picture(out, force, photos)
    from alitok_fast.data.sources import read_image
    from alitok_fast.pipelines import completion
    from alitok_fast.storage.images import write_image

    pipe = load.pipeline()
    (number,) = pipe.classes.ids(label)
    rows = pipe.tokenizer.config.grid // 2 if rows is None else rows
    sheet = completion.complete(pipe, [read_image(photo) for photo in photos], number, rows, variants, params)
    write_image(out, sheet)
    count = len(photos) * variants  # in the order of the sheet
    described = {"photos": [str(photo) for photo in photos], "rows": rows, "variants": variants}
    images = {"labels": [number] * count, "image_ids": list(range(count))}
    write_metadata(out, {**pipe.metadata(params), **described, **images})


@with_options(load=LoadOptions, params=SamplingParams)
def watch(
    labels: Labels,
    out: Annotated[Path, typer.Option(help="Animation (.gif, .webp), or a picture with time from left to right.")],
    load: Any,
    params: Any,
    stage1: Annotated[
        MaybeText, typer.Option(help="Causal (stage-1) tokenizer with the same codes; if not given, that of --model.")
    ] = None,
    force: Force = False,
) -> None:
    """Sample pictures and show how they grow: each row as soon as its tokens are there, finally the finished picture.

    \b
    Examples:
      alitok-fast watch bag "ankle boot" --out growing.gif
      alitok-fast watch 207 --model b.bin --tokenizer tokenizer.pth --stage1 stage1.pth --out growing.png
    """
    check_picture(out, force)
    from alitok_fast.models.loading import find_stage1
    from alitok_fast.pipelines import completion
    from alitok_fast.storage.images import write_film, write_image

    causal = find_stage1(load.model, stage1)
    if causal is None:
        raise ValueError(f"stage1: expected a causal tokenizer, got none, and {load.model} has no folder stage1")
    pipe = load.pipeline()
    ids = pipe.classes.ids(labels)
    frames = completion.grow(pipe, load.load_tokenizer(causal), ids, params)
    if out.suffix.lower() in (".gif", ".webp"):
        write_film(out, completion.film(frames, [pipe.classes[label] for label in ids]))
    else:
        write_image(out, completion.filmstrip(frames))
    described = {"stage1": stage1 or load.model, "labels": ids, "image_ids": list(range(len(ids)))}
    write_metadata(out, {**pipe.metadata(params), **described})
