"""`alitok-fast study ...`: experiments that train several models and compare them. torch loads inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alitok_fast.cli.options import MaybeInt, MaybeTexts, Progress
from alitok_fast.studies.budget import Budget
from alitok_fast.studies.rows import ROWS, chosen_rows, own_row

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train several models and compare them.")


@app.callback()
def _study() -> None:
    pass


@app.command("alignment")
def alignment(
    data: Annotated[Path, typer.Option(help="Data set with two splits: IDX files, or folders of pictures.")],
    out: Annotated[Path, typer.Option(help="Folder of the study; one that was begun goes on.")],
    preset: Annotated[str, typer.Option(help="Preset of the models and their trainings.")] = "demo",
    tokenizer_set: Annotated[
        MaybeTexts, typer.Option(help="Change a setting of all tokenizers, such as steps=1000; repeatable.")
    ] = None,
    generator_set: Annotated[
        MaybeTexts, typer.Option(help="Change a setting of all generators, such as steps=1000; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How often everything is trained; several give intervals.", min=1)] = 1,
    row: Annotated[MaybeTexts, typer.Option(help="Only this row, and what it needs; repeatable.")] = None,
    tokenizer: Annotated[
        MaybeTexts,
        typer.Option(help="NAME=PLACE: a row of your own; a model folder, or MODULE:FUNCTION. Repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Images drawn of each class.", min=1)] = 200,
    judge_epochs: Annotated[int, typer.Option(help="How long the judge learns.", min=1)] = 3,
    train_split: Annotated[str, typer.Option(help="Split to learn from.")] = "train",
    test_split: Annotated[str, typer.Option(help="Split to measure on.")] = "test",
    workers: Annotated[MaybeInt, typer.Option(help="Processes that read pictures.", min=0)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    progress: Progress = True,
) -> None:
    """The alignment study (arXiv 2506.05289, the ablation): which tokens a generator learns best.

    \b
    Examples:
      alitok-fast study alignment --data /usr/share/datasets/fashion-mnist --out runs/alignment
      alitok-fast study alignment --data PHOTOS --preset 256 --seeds 3 --out runs/alignment --device cuda
      alitok-fast study alignment --data PHOTOS --out runs/alignment --tokenizer mine=package.module:make

    Trains the paper's rows (bidirectional, + causal decoder, + prefix tokens, + auxiliary loss, + second stage, and a
    causal encoder), a generator on the tokens of each, and writes table.md, results.json and figure.png. What has a
    result is not trained again; a killed study goes on, and several processes may take rows of their own (--row). The
    judge, a small classifier, holds all images of both splits in memory. A tokenizer of your own has codebook_size,
    encode and decode.
    """
    rows = [*ROWS, *map(own_row, tokenizer or [])]
    chosen_rows(rows, row)
    from alitok_fast.data import open_source
    from alitok_fast.studies.alignment import AlignmentStudy, Splits
    from alitok_fast.studies.report import write_report

    budget = Budget(preset, tuple(tokenizer_set or ()), tuple(generator_set or ()), samples, judge_epochs)
    size = budget.image_size
    splits = Splits(*(open_source(data, split, size, report=typer.echo) for split in (train_split, test_split)))
    study = AlignmentStudy(splits, out, budget, device, workers, progress, typer.echo)

    def report() -> list[Path]:
        return write_report(out, study.results(), study.judge()[1], [one.name for one in rows])

    study.run(rows, seeds, row, report)
    typer.echo(f"wrote {', '.join(map(str, report()))}")
