"""`alitok-fast tokens ...`: caches from and to parquet files, merged, looked at. Mounted by alitok_fast/cli/app.py.

torch loads inside the commands, so that help is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alitok_fast.cli.options import MaybeInt, MaybePath, MaybeText, Progress
from alitok_fast.storage.text import shown

HELP = """Token caches: import, export, merge, look at and check them.

\b
Examples:
  alitok-fast tokens import --parquet data/ --tokenizer alitok_tokenizer.pth --out runs/tokens
  alitok-fast tokens export --cache runs/tokens --out published/
  alitok-fast tokens merge runs/shard1 runs/shard2 --out runs/tokens
  alitok-fast tokens check runs/tokens
"""
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=HELP)

Cache = Annotated[Path, typer.Argument(help="Folder of a token cache.")]
Out = Annotated[Path, typer.Option(help="Folder of the token cache to write.")]
Force = Annotated[bool, typer.Option(help="Write over what --out holds already.")]
TokensColumn = Annotated[MaybeText, typer.Option(help="Column of the tokens; 'tokens' if not given.")]
LabelColumn = Annotated[MaybeText, typer.Option(help="Column of the labels; 'label' if not given.")]


@app.command("import")
def import_command(
    parquet: Annotated[list[str], typer.Option(help="File, folder, or pattern such as 'data/train-*'; repeatable.")],
    out: Out,
    tokens_column: TokensColumn = None,
    label_column: LabelColumn = None,
    image_column: Annotated[MaybeText, typer.Option(help="Rows are crops: column that names their image.")] = None,
    class_names: Annotated[MaybePath, typer.Option(help="File with the name of each class, one per line.")] = None,
    tokenizer: Annotated[
        MaybeText, typer.Option(help="The tokenizer they are from: 'demo', folder, file or hub repository.")
    ] = None,
    codebook_size: Annotated[MaybeInt, typer.Option(help="Number of codes, where no --tokenizer is given.")] = None,
    image_size: Annotated[MaybeInt, typer.Option(help="Side of the images, where no --tokenizer is given.")] = None,
    crops: Annotated[MaybeInt, typer.Option(help="Crops of each image, where the lists do not tell.")] = None,
    force: Force = False,
    progress: Progress = True,
) -> None:
    """Read parquet files into a token cache; an interrupted run is continued.

    Files that `tokens export` wrote need no more than --parquet and --out. Without --tokenizer, tokens are taken for
    those of the published tokenizers where their number fits.

    \b
    Examples:
      alitok-fast tokens import --parquet data/ --tokenizer alitok_tokenizer.pth --out runs/tokens
      alitok-fast tokens import --parquet 'data/train-*.parquet' --tokens-column codes --out runs/tokens
      alitok-fast tokens import --parquet crops.parquet --image-column file --class-names names.txt --out runs/tokens
    """
    from alitok_fast.data.parquet import import_parquet
    from alitok_fast.data.parquet_facts import ParquetColumns, TokenFacts
    from alitok_fast.models.loading import open_checkpoint
    from alitok_fast.models.tokenizer import encoder_fingerprint
    from alitok_fast.progress import tracked

    given = (tokens_column, label_column, image_column)
    columns = ParquetColumns(tokens_column or "tokens", label_column or "label", image_column) if any(given) else None
    known: dict[str, Any] = {"codebook_size": codebook_size, "image_size": image_size, "num_tokens": None}
    fingerprint = None
    if tokenizer is not None:
        opened = open_checkpoint("tokenizer", tokenizer)
        fingerprint = encoder_fingerprint(opened.state)
        for name, value in known.items():
            known[name] = getattr(opened.config, name)
            if value not in (None, known[name]):
                raise ValueError(f"{name}: expected {known[name]} as in the tokenizer, got {value}")
    names = None if class_names is None else _names(class_names)
    facts = TokenFacts(fingerprint, num_crops=crops, class_names=names, **known)
    found = import_parquet(parquet, out, columns, facts, force, lambda groups: tracked("import", groups, progress))
    typer.echo(f"{found.summary}, {found.meta.codebook_size} codes, of {found.meta.image_size} pixels")
    typer.echo(f"wrote {out}")


def _names(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected names in UTF-8, one per line, got {error}") from None
    if not names:
        raise ValueError(f"{path}: expected names, one per line, got none")
    return names


@app.command("export")
def export_command(
    cache: Annotated[Path, typer.Option(help="Folder of a token cache.")],
    out: Annotated[Path, typer.Option(help="Folder to write the parquet files into.")],
    rows_per_file: Annotated[int, typer.Option(help="Images in each file.")] = 100_000,
    tokens_column: TokensColumn = None,
    label_column: LabelColumn = None,
    force: Force = False,
    progress: Progress = True,
) -> None:
    """Write a token cache as parquet files, one row per image, with all that `tokens import` needs.

    Example: alitok-fast tokens export --cache runs/tokens --out published/ --rows-per-file 50000
    """
    from alitok_fast.data import validate_token_cache
    from alitok_fast.data.parquet_export import export_parquet
    from alitok_fast.data.parquet_facts import ParquetColumns
    from alitok_fast.progress import tracked

    columns = ParquetColumns(tokens_column or "tokens", label_column or "label")
    opened = validate_token_cache(cache)
    files = export_parquet(opened, out, rows_per_file, columns, force, lambda f: tracked("export", f, progress))
    typer.echo(opened.summary)
    typer.echo(f"wrote {len(files)} files into {out}")


@app.command("merge")
def merge_command(
    shards: Annotated[list[Path], typer.Argument(help="Folders that `tokenize --shard` wrote, in any order.")],
    out: Out,
    force: Force = False,
    progress: Progress = True,
) -> None:
    """Put shards together into one token cache; an interrupted run is continued, and the shards stay.

    Example: alitok-fast tokens merge runs/shard1 runs/shard2 --out runs/tokens
    """
    from alitok_fast.data import merge_shards
    from alitok_fast.progress import tracked

    typer.echo(merge_shards(shards, out, force, lambda pieces: tracked("merge", pieces, progress)).summary)
    typer.echo(f"wrote {out}")


@app.command("info")
def info_command(cache: Cache) -> None:
    """Print what a token cache is, from its metadata, or how far an unfinished one has come.

    Example: alitok-fast tokens info runs/tokens
    """
    from alitok_fast.data.cache_progress import begun_cache

    meta, done = begun_cache(cache)
    if done < meta.num_images:
        typer.echo(f"unfinished: {done} of {meta.num_images} images")
    classes = ", ".join(map(shown, meta.class_names[:5])) + (", ..." if len(meta.class_names) > 5 else "")
    lines = {
        "images": meta.num_images,
        "shard": f"from image {meta.shard.first} on, of {meta.shard.total}" if meta.shard else None,
        "crops": meta.num_crops,
        "tokens of a crop": meta.num_tokens,
        "codes": meta.codebook_size,
        "image size": meta.image_size,
        "classes": f"{len(meta.class_names)} ({classes})",
        "source": shown(meta.source),
        "tokenizer": shown(meta.tokenizer) or "not known",
        "data": shown(meta.data) or "not known",
    }
    for name, value in lines.items():
        if value is not None:
            typer.echo(f"{name + ':':17} {value}")


@app.command("check")
def check_command(cache: Cache, progress: Progress = True) -> None:
    """Read a token cache whole: ranges, labels, the use of codes and classes, repeated images and crops.

    What cannot be trained on ends with status 2; what may be a mistake is a line of its own.

    Example: alitok-fast tokens check runs/tokens
    """
    from alitok_fast.data import validate_token_cache
    from alitok_fast.evaluation.token_check import check_tokens
    from alitok_fast.progress import tracked

    opened = validate_token_cache(cache)
    report = check_tokens(opened, lambda pieces: tracked("check", pieces, progress))
    for line in (opened.summary, *report.summary, *(f"warning: {line}" for line in report.warnings)):
        typer.echo(line)
