"""`alitok-fast`: parses, calls, prints. The work is in the modules that it imports from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from alitok_fast.cli.train import app as train_app
from alitok_fast.cli.train import tokenize_command
from alitok_fast.data.sources import read_image
from alitok_fast.device import check_device, local_device
from alitok_fast.models import load_tokenizer
from alitok_fast.models.loading import convert as convert_checkpoint
from alitok_fast.models.loading import dtype_from_name
from alitok_fast.pipelines import completion
from alitok_fast.pipelines.bulk import BulkRun, balanced_labels, process_group
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.pipelines.reconstruction import reconstruct_files, side_by_side
from alitok_fast.progress import Bar
from alitok_fast.storage.files import write_json
from alitok_fast.storage.images import check_image_name, grid, write_film, write_image

# typer reads annotations at run time, and on Python 3.10 it needs them in this form.
MaybeText = Optional[str]  # noqa: UP045
MaybeTexts = Optional[list[str]]  # noqa: UP045
MaybeInt = Optional[int]  # noqa: UP045
MaybeFloat = Optional[float]  # noqa: UP045
MaybePath = Optional[Path]  # noqa: UP045
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", callback=check_device)]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Model = Annotated[str, typer.Option(help="'demo', folder, hub repository, or a generator's file.")]
TokenizerOf = Annotated[MaybeText, typer.Option(help="The tokenizer, where --model is a generator alone.")]
Seed = Annotated[int, typer.Option(help="Key of the noise.", min=-(2**63), max=2**63 - 1)]
GuidanceScale = Annotated[MaybeFloat, typer.Option(help="0: none; the model's own if not given.")]
GuidancePower = Annotated[MaybeFloat, typer.Option(help="Exponent of the guidance schedule.")]
Temperature = Annotated[float, typer.Option(help="0: the likeliest token each time.")]
TopK = Annotated[MaybeInt, typer.Option(help="Draw from the k likeliest tokens.")]
TopP = Annotated[MaybeFloat, typer.Option(help="Draw from the smallest set with this probability.")]
WeightDtype = Annotated[
    MaybeText, typer.Option(help="Matrices: CPU float32, bfloat16, int8; CUDA int8, float8_e4m3fn.")
]
DecodeDtype = Annotated[
    MaybeText, typer.Option(help="Tokens to images in this, int8 too on the CPU; if not given bfloat16 where faster.")
]
GRID_IMAGES = 1000
INTERRUPTED = 130  # exit status after Ctrl-C; typer returns it

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="AliTok: photographs to tokens and back, class labels to pictures.",
    epilog="Every command shows examples: alitok-fast COMMAND --help",
)
app.add_typer(train_app, name="train")
app.command("tokenize")(tokenize_command)


@app.command()
def info() -> None:
    """Print versions, what was built, what this machine can use, and why something is off.

    Example: alitok-fast info
    """
    from alitok_fast.info import report

    typer.echo(report())


@app.command()
def sample(
    labels: Annotated[MaybeTexts, typer.Argument(help="Classes, each once, number or name; without any: all.")] = None,
    out: Annotated[MaybePath, typer.Option(help="Folder for PNGs, or a file ending in .npz (ADM's format).")] = None,
    grid_file: Annotated[MaybePath, typer.Option("--grid", help="One picture of all, class after class.")] = None,
    per_class: Annotated[MaybeInt, typer.Option(help="Images of each class; 1 if nothing else is said.")] = None,
    num_images: Annotated[MaybeInt, typer.Option(help="Images in all, a multiple of the classes.")] = None,
    model: Model = "demo",
    tokenizer: TokenizerOf = None,
    seed: Seed = 0,
    guidance_scale: GuidanceScale = None,
    guidance_power: GuidancePower = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    batch_size: Annotated[int, typer.Option(help="Images drawn together.")] = 32,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    weight_dtype: WeightDtype = None,
    decode_dtype: DecodeDtype = None,
    progress: Annotated[bool, typer.Option(help="A progress bar; lines without a terminal.")] = True,
) -> None:
    """Draw pictures of classes; seed, guidance, precision and versions are written beside them as JSON.

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
        check_image_name(grid_file)
    with process_group() as (rank, world):
        pipe = _pipeline(model, tokenizer, local_device(device), dtype, weight_dtype, decode_dtype)
        classes = pipe.label_ids(labels or range(pipe.generator.config.num_classes))
        ids = balanced_labels(classes, num_images, per_class)
        if grid_file is not None and len(ids) > GRID_IMAGES:
            raise ValueError(f"--grid: expected at most {GRID_IMAGES} images, got {len(ids)}")
        settings = pipe.settings(guidance_scale, guidance_power, temperature, top_k, top_p, seed)
        run = None
        if out is not None:
            run = BulkRun(pipe, ids, out, settings, batch_size, rank, world)
            title = "sampling" if world == 1 else f"sampling, process 1 of {world}"
            with Bar(title, run.share, enabled=progress and rank == 0) as bar:
                run.draw(lambda n: bar.advance(by=n))
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
            samples = pipe(shown, **options, **settings)
        pictures, metadata = samples.images, samples.metadata
    else:
        pictures, metadata = run.pictures(order), {**run.manifest, "labels": shown, "image_ids": order}
    columns = len(ids) // len(classes) if len(ids) > len(classes) else min(10, len(ids))
    write_image(grid_file, grid(pictures, columns, [pipe.label_name(label) for label in shown]))
    _write_metadata(grid_file, metadata)


@app.command()
def complete(
    photos: Annotated[list[Path], typer.Argument(help="Picture files.")],
    label: Annotated[str, typer.Option(help="Class to complete them as, by number or name.")],
    out: Annotated[Path, typer.Option(help="Picture to write: photograph, what is given, completions.")],
    rows: Annotated[MaybeInt, typer.Option(help="Rows of patches to keep; half of them if not given.")] = None,
    variants: Annotated[int, typer.Option(help="Completions of each photograph.")] = 3,
    model: Model = "demo",
    tokenizer: TokenizerOf = None,
    seed: Seed = 0,
    guidance_scale: GuidanceScale = None,
    guidance_power: GuidancePower = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    weight_dtype: WeightDtype = None,
    decode_dtype: DecodeDtype = None,
) -> None:
    """Keep the upper part of photographs and let the generator draw the rest.

    \b
    Examples:
      alitok-fast complete photo.jpg --label "ankle boot" --out completed.png
      alitok-fast complete cat.jpg --model b.bin --tokenizer tokenizer.pth --label 281 --rows 6 --out cats.png
    """
    check_image_name(out)
    pipe = _pipeline(model, tokenizer, device, dtype, weight_dtype, decode_dtype)
    settings = pipe.settings(guidance_scale, guidance_power, temperature, top_k, top_p, seed)
    rows = pipe.tokenizer.config.grid // 2 if rows is None else rows
    sheet = completion.complete(pipe, [read_image(photo) for photo in photos], label, rows, variants, settings)
    write_image(out, sheet)
    drawn = len(photos) * variants  # in the order of the sheet
    described = {"photos": [str(photo) for photo in photos], "rows": rows, "variants": variants}
    images = {"labels": pipe.label_ids(label) * drawn, "image_ids": list(range(drawn))}
    _write_metadata(out, {**pipe.metadata(settings), **described, **images})


@app.command()
def watch(
    labels: Annotated[list[str], typer.Argument(help="Classes, by number or name.")],
    stage1: Annotated[str, typer.Option(help="Causal (stage-1) tokenizer with the same codes.")],
    out: Annotated[Path, typer.Option(help="Animation (.gif, .webp), or a picture with time from left to right.")],
    model: Model = "demo",
    tokenizer: TokenizerOf = None,
    seed: Seed = 0,
    guidance_scale: GuidanceScale = None,
    guidance_power: GuidancePower = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    weight_dtype: WeightDtype = None,
    decode_dtype: DecodeDtype = None,
) -> None:
    """Draw pictures and show how they grow: each row as soon as its tokens are there, last the finished picture.

    \b
    Examples:
      alitok-fast watch bag "ankle boot" --stage1 runs/stage1/model --out growing.gif
      alitok-fast watch 207 --model b.bin --tokenizer tokenizer.pth --stage1 stage1.pth --out growing.png
    """
    check_image_name(out)
    pipe = _pipeline(model, tokenizer, device, dtype, weight_dtype, decode_dtype)
    settings = pipe.settings(guidance_scale, guidance_power, temperature, top_k, top_p, seed)
    frames = completion.grow(pipe, load_tokenizer(stage1, device, dtype_from_name(dtype)), labels, settings)
    if out.suffix.lower() in (".gif", ".webp"):
        write_film(out, completion.film(frames, [pipe.label_name(i) for i in pipe.label_ids(labels)]))
    else:
        write_image(out, completion.filmstrip(frames))
    images = {"labels": pipe.label_ids(labels), "image_ids": list(range(len(labels)))}
    _write_metadata(out, {**pipe.metadata(settings), "stage1": stage1, **images})


@app.command()
def reconstruct(
    photos: Annotated[list[Path], typer.Argument(help="Picture files.")],
    out: Annotated[Path, typer.Option(help="Picture to write: originals left, reconstructions right.")],
    model: Annotated[str, typer.Option(help="Tokenizer: 'demo', folder, file or hub repository.")] = "demo",
    tile: Annotated[bool, typer.Option(help="Keep the resolution: cut into squares of the tokenizer's size.")] = False,
    on_error: Annotated[str, typer.Option(help="Unreadable pictures: 'stop', or 'skip' them by name.")] = "stop",
    batch_size: Annotated[int, typer.Option(help="Squares decoded together.")] = 16,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Photographs through the tokenizer and back, with the PSNR.

    \b
    Examples:
      alitok-fast reconstruct photo.jpg --out side_by_side.png --tile
      alitok-fast reconstruct photos/*.jpg --model alitok_tokenizer.pth --out side_by_side.png
    """
    check_image_name(out)
    model_ = load_tokenizer(model, device, dtype_from_name(dtype))
    results = reconstruct_files(model_, photos, tile, batch_size, on_error)
    for path, result in results.items():
        typer.echo(f"{path}: {result.tokens.numel()} tokens, PSNR {result.psnr:.2f} dB")
    write_image(out, side_by_side(results))
    typer.echo(f"wrote {out}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint file in the released format, or a folder of ours.")],
    target: Annotated[Path, typer.Argument(help="Folder to write, or a file ending in .safetensors or .pth.")],
    kind: Annotated[MaybeText, typer.Option(help="'tokenizer' or 'generator', where the source holds both.")] = None,
    dtype: Annotated[MaybeText, typer.Option(help="float32, bfloat16 or float16; unchanged if not given.")] = None,
) -> None:
    """Convert a checkpoint between the released format and our folders, or to another precision.

    \b
    Examples:
      alitok-fast convert alitok_b.bin models/b/generator --dtype bfloat16
      alitok-fast convert models/b/generator alitok_b.safetensors
    """
    typer.echo(f"wrote {convert_checkpoint(source, target, kind, dtype_from_name(dtype))}")


def _pipeline(
    model: str, tokenizer: str | None, device: str, dtype: str, weight_dtype: str | None, decode_dtype: str | None
) -> Pipeline:
    return Pipeline.from_pretrained(
        model,
        device,
        dtype_from_name(dtype),
        tokenizer,
        dtype_from_name(weight_dtype, "weight_dtype"),
        dtype_from_name(decode_dtype, "decode_dtype"),
    )


def _write_metadata(picture: Path, metadata: dict[str, Any]) -> None:
    """Beside `picture`, under its whole name: x.json might be a file of the user's."""
    beside = picture.with_name(picture.name + ".json")
    write_json(beside, metadata)
    typer.echo(f"wrote {picture} and {beside}")


def main() -> None:
    """Entry point. What the user can mend is one line and exit status 2; ALITOK_TRACEBACK=1 shows where it arose."""
    try:
        status = app(prog_name="alitok-fast", standalone_mode=False)
        if status == INTERRUPTED:
            _complain("interrupted", status)
    except typer.Abort:
        status = _complain("interrupted", INTERRUPTED)
    except (ValueError, TypeError, OverflowError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if os.environ.get("ALITOK_TRACEBACK"):
            raise
        status = _complain(str(error) or "out of memory", 1 if isinstance(error, RuntimeError | MemoryError) else 2)
    except Exception as error:
        if not hasattr(error, "format_message"):  # neither the library's nor the parser's complaint: a bug
            raise
        status = _complain(f"{error.format_message()} (alitok-fast --help)", 2)
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    typer.echo(f"alitok-fast: {' '.join(message.split())}", err=True)
    return status
