"""`alitok-fast evaluate paper`: the published protocol in one command. torch loads inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from alitok_fast.cli.evaluate_options import DrawOptions, check_result, say_result, seeds_of, warnings, working_folder
from alitok_fast.cli.evaluate_reconstruction import READING, HeldOutOptions
from alitok_fast.cli.options import BatchSize, MaybePath, Progress, option, with_options


@dataclass(frozen=True)
class PaperOptions(DrawOptions):
    """Published weights, in the published precision."""

    model: str = option(..., "A folder or hub repository with both models, or the released generator.")
    decode_dtype: str = option("float32", "Precision of the step from tokens to pixels.")


@with_options(load=PaperOptions)
def paper(
    load: Any,
    size: Annotated[str, typer.Option(help="Published model: b, l or xl.")],
    imagenet_val: Annotated[Path, typer.Option(help="ImageNet's validation images, as --data of training takes them.")],
    adm_reference: Annotated[Path, typer.Option(help="The ADM suite's VIRTUAL_imagenet256_labeled.npz.")],
    inception: Annotated[
        MaybePath, typer.Option("--weights", help="torch-fidelity's file of Inception's weights; fetched if not given.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Images of each seed, a multiple of the classes.", min=1)] = 50_000,
    seeds: Annotated[str, typer.Option(help="Seeds with commas between them; several give an interval.")] = "0",
    unguided: Annotated[bool, typer.Option("--unguided", help="Measure images without guidance, too.")] = False,
    out: Annotated[MaybePath, typer.Option(help="JSON file of the result.")] = None,
    work: Annotated[
        MaybePath, typer.Option(help="Folder of features, which stays; else beside --out until that is written.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is no such result.")] = False,
    batch_size: BatchSize = 32,
    progress: Progress = True,
) -> None:
    """The published protocol in one command: 50,000 images with the published guidance against the ADM suite's file,
    and rFID against the validation images, beside the published numbers.

    A killed run goes on when the same command is given again, also with another number of processes.

    \b
    Examples:
      alitok-fast evaluate paper --size b --model alitok_b.bin --tokenizer alitok_tokenizer.pth --device cuda \\
          --imagenet-val imagenet/val --adm-reference VIRTUAL_imagenet256_labeled.npz --out b.json
      torchrun --nproc-per-node 8 -m alitok_fast.cli evaluate paper --size xl --model DIR --device cuda --unguided \\
          --imagenet-val imagenet/val --adm-reference VIRTUAL_imagenet256_labeled.npz --seeds 0,1,2 --out xl.json
    """
    from alitok_fast.device import check_device, local_device
    from alitok_fast.evaluation.networks import load_network
    from alitok_fast.evaluation.reference import read_reference
    from alitok_fast.pipelines.bulk import first_says, process_group
    from alitok_fast.pipelines.paper_evaluation import FORMAT, evaluate_paper
    from alitok_fast.storage.files import write_json

    check_result(out, FORMAT, force)
    wanted = seeds_of(seeds)
    with process_group() as (rank, world):
        reference = first_says(lambda: read_reference(adm_reference, "--adm-reference"), rank, world)
        network = load_network("inception", inception, local_device(check_device(load.device)), "--weights")
        pipe = load.pipeline()
        validation = HeldOutOptions(data=str(imagenet_val)).open(
            typer.echo if rank == 0 else lambda line: None,
            image_size=pipe.tokenizer.config.image_size,
            apply_orientation=False,
            convert_profile=False,
            draft=False,
        )
        with working_folder(work, out, rank, world) as folder:
            result = evaluate_paper(
                pipe,
                size,
                validation,
                reference,
                network,
                folder,
                num_images=num_images,
                seeds=wanted,
                unguided=unguided,
                reading=READING,
                batch_size=batch_size,
                rank=rank,
                world=world,
                progress=progress,
            )
            if result is not None and out is not None:
                write_json(out, result)
    if result is not None:
        say_result([*_table(result), *warnings(result["doubts"])], out)


def _table(result: Mapping[str, Any]) -> list[str]:
    """Ours beside what was published."""
    from alitok_fast.pipelines.paper_evaluation import RELEASES, beside_published

    rows = [("", "measured", *(f"published ({release})" for release in RELEASES))]
    for name, found, published in beside_published(result):
        half = f" +- {found['interval']:.3g}" if "interval" in found else ""
        rows.append((name, f"{found['mean']:.6g}{half}", *(f"{published.get(release, '')}" for release in RELEASES)))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"AliTok-{result['size'].upper()}, published numbers of {result['published']['source']}", *lines]
