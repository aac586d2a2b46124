"""How well a tokenizer gives a set of pictures back, in the field's measures, from one pass over the pictures.

Each file of a `FeatureFolder` holds, of its images, all that the measures are made of: tokens, PSNR, SSIM, LPIPS, and
the features of original and reconstruction. So any number of processes give the numbers of one, a killed run goes on,
and the memory is that of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL
import torch

from alitok_fast import __version__
from alitok_fast.data.checks import require_count
from alitok_fast.data.reading import default_workers
from alitok_fast.data.sources import ImageSource, check_source
from alitok_fast.evaluation.feature_folder import CHUNK, FeatureFolder
from alitok_fast.evaluation.image_sets import CROP, CroppedImages
from alitok_fast.evaluation.networks import Network
from alitok_fast.evaluation.reconstruction import (
    ReconstructionMeasure,
    image_measures,
    reconstruction_distances,
    reconstruction_doubts,
)
from alitok_fast.evaluation.reference import Reference
from alitok_fast.evaluation.similarity import SSIM, Lpips
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.image_encoder import ImageEncoder
from alitok_fast.models import Tokenizer
from alitok_fast.pipelines.bulk import first_says, wait_for_all
from alitok_fast.pipelines.sample_evaluation import described_reference, paired
from alitok_fast.progress import Bar
from alitok_fast.storage.files import weights_fingerprint

FORMAT = "alitok_fast reconstruction 1"


def evaluate_reconstruction(
    tokenizer: Tokenizer,
    source: ImageSource,
    work: Path,
    networks: Sequence[Network],
    lpips: Lpips | None = None,
    reference: Reference | None = None,
    *,
    num_images: int | None = None,
    encode_dtype: torch.dtype = torch.float32,
    decode_dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    workers: int | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
    reading: str = "as the source gives them",
    chunk: int = CHUNK,
) -> dict[str, Any] | None:
    """Encode and decode the pictures of a source, and measure how far what comes back is from what went in.

    Each picture's centre crop (`alitok_fast.data.transforms.centre_crop`) is the original; the reconstruction is
    truncated to uint8 (`alitok_fast.storage.images.to_uint8`), and both are measured as uint8.

    Args:
        tokenizer: in evaluation mode.
        source: pictures (see alitok_fast.data.sources). The field takes ImageNet's 50,000 validation images.
        work: folder of what is computed, made or gone on with; 16 kB for an image in Inception.
        networks: in whose features Frechet and kernel distance are measured (`load_network`); none leaves these out.
        lpips: None leaves LPIPS out.
        reference: statistics to measure the Frechet distance from in place of the originals'; for one network.
        num_images: the first so many of the source, >= 2; all, if not given.
        encode_dtype: as for `ImageEncoder`.
        decode_dtype: as for `ImageDecoder`.
        batch_size: images computed together, which may change last bits.
        workers: threads that read pictures; one per core, at most 8, if not given.
        rank: of this process among `world`, each of which makes the same call.
        progress: show a bar, in the first process.
        reading: how the source reads pictures, for the record.
        chunk: images of a file.

    Returns:
        JSON values. `psnr` (dB), `ssim` and `lpips` are means over the images, with their standard error as
        NAME_error; `psnr_of_mean_error` is that of the squared error averaged over all images; `codebook_usage` is the
        share of the codes that occur, `codebook_perplexity` as in `alitok_fast.evaluation.codebook`. Under `distances`
        are, for each network, the Frechet distance and the kernel distance of pooled features; of Inception's they are
        `rfid` and `rkid`. `doubts` says what makes the numbers incomparable with published ones, `facts` what they
        are of. None in all processes but the first.

    Raises:
        TypeError, ValueError: naming the argument; for a `work` folder of other pictures or settings, what differs.
        RuntimeError: pixels became NaN or infinite.
    """
    check_source(source)
    require_count("batch_size", batch_size)
    workers = default_workers() if workers is None else require_count("workers", workers)
    count = len(source) if num_images is None else require_count("num_images", num_images, least=2)
    if count > len(source):
        raise ValueError(f"num_images: expected at most {len(source)}, the pictures of {source.name}, got {count}")
    names = [network.name for network in networks]
    if len(set(names)) < len(names):
        raise ValueError(f"networks: expected each once, got {', '.join(names)}")
    if reference is not None:
        paired(networks, [reference])
        if "pooled" not in reference.moments:
            raise ValueError(f"reference: expected moments of 'pooled', got those of {', '.join(reference.moments)}")
    images = CroppedImages(source, tokenizer.config.image_size, batch_size, workers, reading)
    encoder, decoder = ImageEncoder(tokenizer, encode_dtype), ImageDecoder(tokenizer, decode_dtype)
    facts = {
        "data": dict(images.facts),
        "crop": CROP,
        "size": images.size,
        "tokenizer": weights_fingerprint(tokenizer.state_dict()),
        "tokenizer_stage": tokenizer.config.stage,
        "encode_dtype": str(encoder.dtype).removeprefix("torch."),
        "decode_dtype": str(decoder.dtype).removeprefix("torch."),
        "rounding": "truncated to uint8",
        "ssim": SSIM,
        "lpips": None if lpips is None else dict(lpips.facts),
        "networks": {network.name: dict(network.facts) for network in networks},
        "originals_measured": reference is None,
        "batch_size": batch_size,
    }
    folder = first_says(lambda: FeatureFolder(work, count, facts, chunk), rank, world)
    measure = ReconstructionMeasure(encoder, decoder, networks, lpips, reference is None)
    mine = {part.start for part in folder.chunks[rank::world]}
    share = sum(len(part) for part in folder.missing() if part.start in mine)
    title = "reconstruction" if world == 1 else f"reconstruction, process 1 of {world}"
    with Bar(title, share, enabled=progress and rank == 0) as bar:
        folder.compute(images.batches, measure, rank, world, lambda done: bar.advance(by=done))
    wait_for_all(world)
    if rank:
        return None
    origin = {"kind": "the originals themselves"} if reference is None else described_reference(reference)
    return {
        "format": FORMAT,
        "images": count,
        **image_measures(folder, tokenizer.config.codebook_size),
        "distances": {network.name: reconstruction_distances(folder, network, reference) for network in networks},
        "doubts": reconstruction_doubts(count, source, facts, networks, reference),
        "facts": {**facts, "reference": origin},
        "device": str(tokenizer.device),
        "versions": {"alitok_fast": __version__, "torch": torch.__version__, "pillow": PIL.__version__},
    }
