"""`alitok-fast evaluate reconstruction`: how well a tokenizer gives pictures back. torch loads inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from alitok_fast.cli.data import NO_SPLITS, SourceOptions, first_split
from alitok_fast.cli.evaluate_options import NetworkOptions, check_result, say_result, warnings, working_folder
from alitok_fast.cli.options import (
    BatchSize,
    MaybeInt,
    MaybePath,
    Progress,
    option,
    with_options,
)
from alitok_fast.storage.text import shown

AUTO, NONE = "auto", "none"
READING = "EXIF orientation ignored, colour profiles ignored, JPEGs whole"
UNITS = {"psnr": " dB", "psnr_of_mean_error": " dB"}


@dataclass(frozen=True)
class HeldOutOptions(SourceOptions):
    """Pictures that the tokenizer was not trained on, where there are any, read as the published preparation does."""

    split: str = option(AUTO, "Split of the data; 'auto' takes val, validation or test, or data without splits whole.")

    def open(self, report: Callable[[str], object], **reading: Any) -> Any:
        """The source; raises as `alitok_fast.data.open_source`."""
        from alitok_fast.data.sources import HELD_OUT

        if self.split != AUTO:
            return super().open(report, **reading)
        splits = (*HELD_OUT, NO_SPLITS)
        return first_split(splits, lambda split: dataclasses.replace(self, split=split).open(report, **reading))


@with_options(source=HeldOutOptions, networks=NetworkOptions)
def reconstruction(
    source: Any,
    networks: Any,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer: 'demo', a model folder or a checkpoint file.")] = "demo",
    lpips: Annotated[str, typer.Option(help="Network of LPIPS: vgg, alex, squeeze or none.")] = "vgg",
    lpips_weights: Annotated[MaybePath, typer.Option(help="torchvision's file of its weights.")] = None,
    reference: Annotated[
        MaybePath, typer.Option(help="Statistics to measure from in place of the originals: .npz, .pt, .safetensors.")
    ] = None,
    num_images: Annotated[MaybeInt, typer.Option(help="Take the first so many pictures.", min=1)] = None,
    encode_dtype: Annotated[
        str, typer.Option(help="Precision of the encoder: float32, bfloat16, float16 or, on a CPU, int8.")
    ] = "float32",
    decode_dtype: Annotated[str, typer.Option(help="Precision of the decoder: the same.")] = "float32",
    out: Annotated[MaybePath, typer.Option(help="JSON file of the result.")] = None,
    work: Annotated[
        MaybePath,
        typer.Option(help="Folder of features, which stays; if not given, one beside --out until that is written."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    batch_size: BatchSize = 32,
    workers: Annotated[
        MaybeInt, typer.Option(help="Threads that read pictures; one per core, at most 8, if not given.", min=1)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that this command has not written.")
    ] = False,
    progress: Progress = True,
) -> None:
    """Take pictures through the tokenizer and back: rFID and rKID from the originals, PSNR, SSIM, LPIPS, use of codes.

    The field measures ImageNet's 50,000 validation images. `--network none` leaves rFID out. A killed run goes on when
    the same command is given again, by any number of processes.

    \b
    Examples:
      alitok-fast evaluate reconstruction --data imagenet/ --tokenizer alitok_tokenizer.pth --device cuda --out r.json
      alitok-fast evaluate reconstruction --data photos/ --network efficientnet_lite0 --lpips none --out demo.json
      alitok-fast evaluate reconstruction --data imagenet/ --network inception --network dinov2_vitb14 --out both.json
      torchrun --nproc-per-node 8 -m alitok_fast.cli evaluate reconstruction --data imagenet/ --device cuda --out r.json
    """
    from alitok_fast.data.checks import require_choice
    from alitok_fast.device import check_device, local_device
    from alitok_fast.evaluation.reference import read_reference
    from alitok_fast.evaluation.similarity import Lpips
    from alitok_fast.models.loading import dtype_from_name, load_tokenizer
    from alitok_fast.models.perceptual import TRUNKS
    from alitok_fast.pipelines.bulk import process_group
    from alitok_fast.pipelines.reconstruction_evaluation import FORMAT, evaluate_reconstruction
    from alitok_fast.storage.files import write_json

    check_result(out, FORMAT, force)
    require_choice("lpips", lpips, (*TRUNKS, NONE))
    place = local_device(check_device(device))
    precision: Any = {"encode_dtype": encode_dtype, "decode_dtype": decode_dtype}
    precision = {name: dtype_from_name(value, name) for name, value in precision.items()}
    with process_group() as (rank, world):
        model = load_tokenizer(tokenizer, place).eval()
        pictures = source.open(
            typer.echo if rank == 0 else lambda line: None,
            image_size=model.config.image_size,
            apply_orientation=False,
            convert_profile=False,
            draft=False,
        )
        judges = [] if networks.names == [NONE] else networks.load(device)
        distance = None if lpips == NONE else Lpips.load(lpips, lpips_weights, place, "--lpips-weights")
        statistics = None if reference is None else read_reference(reference, "--reference")
        with working_folder(work, out, rank, world) as folder:
            result = evaluate_reconstruction(
                model,
                pictures,
                folder,
                judges,
                distance,
                statistics,
                num_images=num_images,
                batch_size=batch_size,
                workers=workers,
                rank=rank,
                world=world,
                progress=progress,
                reading=READING,
                **precision,
            )
            if result is not None and out is not None:
                write_json(out, {**result, "tokenizer": tokenizer})
    if result is not None:
        say_result(_table(result), out)


def _table(result: dict[str, Any]) -> list[str]:
    """The result for people: a line for each measure, then what hinders a comparison."""
    rows = [("images", f"{result['images']:,}")]
    for network, distances in result["distances"].items():
        rows += [(f"{name} ({shown(network)})", text) for name, text in _values(distances, "_std")]
    measures = {name: value for name, value in result.items() if name == "exact_images" or isinstance(value, float)}
    rows += _values(measures, "_error")
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {text}" for name, text in rows] + warnings(result["doubts"])


def _values(measures: dict[str, Any], spread: str) -> list[tuple[str, str]]:
    """Names and values, each with its standard error, or deviation over subsets, behind it."""
    found = []
    for name, value in measures.items():
        if name.removesuffix(spread) in measures.keys() - {name}:
            continue
        about = measures.get(name + spread)
        text = f"{value:.5g}" if about is None else f"{value:.5g} +- {about:.2g}"
        found.append((name, text + UNITS.get(name, "")))
    return found
