"""The published protocol as a whole: ImageNet, 256 x 256, in Inception's features (arXiv 2506.05289, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alitok_fast.config import GENERATORS
from alitok_fast.data.sources import ImageSource
from alitok_fast.evaluation.networks import Network
from alitok_fast.evaluation.reference import Reference
from alitok_fast.inference.params import SamplingParams
from alitok_fast.pipelines.bulk import balanced_labels
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.pipelines.reconstruction_evaluation import evaluate_reconstruction
from alitok_fast.pipelines.sample_evaluation import drawn_images, measure_samples, paired
from alitok_fast.storage.files import differences

FORMAT = "alitok_fast evaluation of the paper 1"
RELEASES = ("first release", "later version")
"""The weights that are public are of the first one; the paper's later version has numbers of newer ones."""
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "b": {"fid": {RELEASES[0]: 1.50, RELEASES[1]: 1.44}, "inception_score": {RELEASES[0]: 305.9, RELEASES[1]: 319.5},
          "unguided fid": {RELEASES[1]: 2.40}, "rfid": {RELEASES[1]: 0.86}},
    "l": {"fid": {RELEASES[0]: 1.42, RELEASES[1]: 1.38}, "inception_score": {RELEASES[0]: 326.6, RELEASES[1]: 326.2},
          "unguided fid": {RELEASES[1]: 1.98}, "rfid": {RELEASES[1]: 0.86}},
    "xl": {"fid": {RELEASES[0]: 1.35, RELEASES[1]: 1.28}, "inception_score": {RELEASES[0]: 318.8, RELEASES[1]: 306.3},
           "unguided fid": {RELEASES[1]: 1.88}, "rfid": {RELEASES[1]: 0.86}},
}  # fmt: skip


def evaluate_paper(
    pipe: Pipeline,
    size: str,
    validation: ImageSource,
    reference: Reference,
    network: Network,
    work: Path,
    *,
    num_images: int = 50_000,
    seeds: Sequence[int] = (0,),
    unguided: bool = False,
    reading: str = "as the source gives them",
    batch_size: int = 32,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> dict[str, Any] | None:
    """gFID and its companions against the ADM suite's file, and rFID against the validation images.

    Args:
        pipe: of the published weights.
        size: "b", "l" or "xl": whose guidance is taken, and whose published numbers stand beside the result.
        validation: ImageNet's 50,000 validation images.
        reference: VIRTUAL_imagenet256_labeled.npz.
        network: Inception.
        num_images: drawn for each seed, a multiple of the classes.
        unguided: also measure images without guidance.
        reading: how the source reads pictures, for the record.

    The rest is as for `measure_samples`, and the result holds its results as "guided" and "unguided", that of
    `evaluate_reconstruction` as "reconstruction", and the "published" numbers. None in all processes but the first.

    Raises:
        ValueError: for another size, statistics of others than the ADM suite, or as the two functions do.
    """
    if size not in PUBLISHED:
        raise ValueError(f"size: expected one of {', '.join(PUBLISHED)}, got {size!r}")
    if reference.kind != "ADM":
        raise ValueError(f"adm_reference: expected the ADM suite's npz, got {reference.kind}'s statistics")
    preset, pairs = GENERATORS[size], paired([network], [reference])
    labels = balanced_labels(range(len(pipe.classes)), num_images, None)
    scales = {"guided": preset.guidance_scale} | ({"unguided": 0.0} if unguided else {})
    results: dict[str, Any] = {}
    for name, scale in scales.items():
        params = SamplingParams(guidance_scale=scale, guidance_power=preset.guidance_power)
        sets = drawn_images(pipe, labels, params, seeds, batch_size)
        results[name] = measure_samples(sets, pairs, work, batch_size, rank, world, progress)
    results["reconstruction"] = evaluate_reconstruction(
        pipe.tokenizer,
        validation,
        work / "reconstruction",
        [network],
        decode_dtype=pipe.image_decoder.dtype,
        batch_size=batch_size,
        rank=rank,
        world=world,
        progress=progress,
        reading=reading,
    )
    if rank:
        return None
    doubts = _doubts_of_model(pipe, size)
    for name, result in results.items():
        doubts += [f"{name}: {line}" for line in result.pop("doubts")]
    published = {"source": "arXiv 2506.05289", **PUBLISHED[size]}
    return {"format": FORMAT, "size": size, **results, "published": published, "doubts": doubts}


def beside_published(result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, float]]]:
    """Measure by measure: its name, what was measured ("mean", "values", ...), and what was published, by release."""
    rows = [(name, found) for name, found in result["guided"]["measures"]["inception"].items()]
    rows += [
        (f"unguided {name}", found)
        for name, found in result.get("unguided", {"measures": {"inception": {}}})["measures"]["inception"].items()
    ]
    rows.append(("rfid", {"mean": result["reconstruction"]["distances"]["inception"]["rfid"]}))
    return [(name, found, result["published"].get(name, {})) for name, found in rows]


def _doubts_of_model(pipe: Pipeline, size: str) -> list[str]:
    """Where the weights are not of the published size."""
    preset, config = (dict(made.to_dict()) for made in (GENERATORS[size], pipe.generator.config))
    unlike = differences(preset, config, ("guidance_scale", "guidance_power", "dropout"))
    if not unlike:
        return []
    return [f"the generator is not of the published size {size.upper()}: {'; '.join(unlike)}"]
