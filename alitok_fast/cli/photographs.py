"""`alitok-fast reconstruct` and `convert`: a tokenizer's work on photographs, and checkpoints between formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alitok_fast.cli.options import (
    BatchSize,
    DeviceOptions,
    Force,
    MaybeText,
    check_picture,
    with_options,
    write_metadata,
)
from alitok_fast.storage.text import shown


@with_options(load=DeviceOptions)
def reconstruct(
    photos: Annotated[list[Path], typer.Argument(help="Picture files.")],
    out: Annotated[Path, typer.Option(help="Picture to write: originals left, reconstructions right.")],
    load: Any,
    model: Annotated[
        str, typer.Option(help="Tokenizer: 'photos-64', 'demo', folder, file or hub repository.")
    ] = "photos-64",
    tile: Annotated[bool, typer.Option(help="Keep the resolution: cut into squares of the tokenizer's size.")] = False,
    on_error: Annotated[str, typer.Option(help="'stop' at an unreadable picture, or 'skip' it by name.")] = "stop",
    batch_size: BatchSize = 16,
    force: Force = False,
) -> None:
    """Take photographs through the tokenizer and back, and print the PSNR.

    \b
    Examples:
      alitok-fast reconstruct photo.jpg --out side_by_side.png --tile
      alitok-fast reconstruct photos/*.jpg --model alitok_tokenizer.pth --out side_by_side.png
    """
    check_picture(out, force, photos)
    from alitok_fast.pipelines.reconstruction import describe, reconstruct_files, side_by_side
    from alitok_fast.storage.images import write_image

    results = reconstruct_files(load.load_tokenizer(model), photos, tile, batch_size, on_error)
    for path, result in results.items():
        typer.echo(f"{shown(path, 1000)}: PSNR {result.psnr:.2f} dB, {result.tokens.numel()} tokens")
    write_image(out, side_by_side(results))
    write_metadata(out, {**describe(results, tile), "model": model, "dtype": load.dtype})


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint file in the released format, or a folder of ours.")],
    target: Annotated[Path, typer.Argument(help="Folder to write, or a file ending in .safetensors or .pth.")],
    kind: Annotated[MaybeText, typer.Option(help="'tokenizer' or 'generator', where the source holds both.")] = None,
    dtype: Annotated[MaybeText, typer.Option(help="float32, bfloat16 or float16; unchanged if not given.")] = None,
    weights: Annotated[str, typer.Option(help="Of a checkpoint with averaged weights, 'ema' or 'raw'.")] = "ema",
    force: Force = False,
) -> None:
    """Convert a checkpoint between the released format and our folders, or to another precision.

    \b
    Examples:
      alitok-fast convert alitok_b.bin models/b/generator --dtype bfloat16
      alitok-fast convert models/b/generator alitok_b.safetensors
    """
    from alitok_fast.models.loading import convert as convert_checkpoint
    from alitok_fast.models.loading import dtype_from_name

    written = convert_checkpoint(source, target, kind, dtype_from_name(dtype), weights=weights, force=force)
    typer.echo(f"wrote {written}")
