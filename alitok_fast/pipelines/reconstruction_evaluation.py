"""How well a tokenizer gives a set of pictures back, in the field's measures, from one pass over the pictures.

Each file of a `FeatureFolder` holds, of its images, all that the measures are made of: tokens, PSNR, SSIM, LPIPS, and
the features of original and reconstruction. So any number of processes give the numbers of one, a killed run goes on,
and the memory is that of a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor

from alitok_fast import __version__
from alitok_fast.data.checks import require_count
from alitok_fast.data.loader import to_floats
from alitok_fast.data.reading import default_workers
from alitok_fast.data.sources import ImageSource, check_source
from alitok_fast.evaluation.codebook import codebook_perplexity, codebook_usage
from alitok_fast.evaluation.comparison import (
    IMAGES,
    INCEPTION_NAMES,
    SUBSET,
    doubts_of_network,
    doubts_of_pairing,
)
from alitok_fast.evaluation.feature_folder import CHUNK, FeatureFolder
from alitok_fast.evaluation.image_sets import CROP, CroppedImages
from alitok_fast.evaluation.measures import frechet_distance, kernel_distance
from alitok_fast.evaluation.networks import Network
from alitok_fast.evaluation.psnr import psnr
from alitok_fast.evaluation.reference import Reference
from alitok_fast.evaluation.similarity import SSIM, Lpips, ssim
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.image_encoder import ImageEncoder
from alitok_fast.models import Tokenizer
from alitok_fast.pipelines.bulk import first_says, wait_for_all
from alitok_fast.pipelines.sample_evaluation import described_reference, paired
from alitok_fast.progress import Bar
from alitok_fast.storage.files import weights_fingerprint
from alitok_fast.storage.images import to_uint8
from alitok_fast.storage.text import shown

FORMAT = "alitok_fast reconstruction 1"
CLASSES = 1000  # of ImageNet
PUBLISHED_LPIPS = "vgg"
ADM_DOUBT = (
    "the reference is an npz in the ADM suite's form, and the suite's own are of ImageNet's training images, "
    "but rFID is measured from the validation images that were encoded (what was 1.90, 4.28 and 1.22 from ADM's was "
    "then 0.578, 2.11 and 0.53)"
)


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
    measure = _Measure(encoder, decoder, networks, lpips, reference is None)
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
        **_of_images(folder, tokenizer.config.codebook_size),
        "distances": {network.name: _distances(folder, network, reference) for network in networks},
        "doubts": _doubts(count, source, facts, networks, reference),
        "facts": {**facts, "reference": origin},
        "device": str(tokenizer.device),
        "versions": {"alitok_fast": __version__, "torch": torch.__version__, "pillow": PIL.__version__},
    }


class _Measure:
    """Originals (B, 3, S, S) uint8 -> all that is kept of them and of their reconstructions, (B, d) by name."""

    def __init__(
        self,
        encoder: ImageEncoder,
        decoder: ImageDecoder,
        networks: Sequence[Network],
        lpips: Lpips | None,
        originals: bool,
    ) -> None:
        self.encoder, self.decoder, self.networks, self.lpips = encoder, decoder, networks, lpips
        self.originals = originals

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        images = pixels.to(self.decoder.device)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            tokens = self.encoder(to_floats(images))
            decoded = (
                torch.from_numpy(to_uint8(self.decoder(tokens))).permute(0, 3, 1, 2).contiguous().to(images.device)
            )
            found = {"tokens": tokens, "ssim": ssim(images, decoded)[:, None]}
            found["psnr"] = psnr(*(values.double() / 255 for values in (images, decoded)))[:, None]
            if self.lpips is not None:
                found["lpips"] = self.lpips(images, decoded)[:, None]
        for network in self.networks:
            found[f"decoded.{network.name}"] = network(decoded)["pooled"]
            if self.originals:
                found[f"original.{network.name}"] = network(images)["pooled"]
        return found


def _of_images(folder: FeatureFolder, codebook_size: int) -> dict[str, Any]:
    """Means over the images, and how the codes are used. Of images that came back exactly the PSNR is infinite."""
    found: dict[str, Any] = {}
    for name in sorted(folder.names() & {"psnr", "ssim", "lpips"}, key=("psnr", "ssim", "lpips").index):
        values = folder.vectors(name)[:, 0].double()
        if name == "psnr":
            exact = values.isinf()
            found["exact_images"] = int(exact.sum())
            error = (10 ** (-values / 10)).mean()
            found["psnr_of_mean_error"] = float(-10 * torch.log10(error)) if error > 0 else None
            values = values[~exact]
        found[name] = float(values.mean()) if len(values) else None
        found[f"{name}_error"] = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    counts = torch.zeros(codebook_size, dtype=torch.int64)
    for tokens in folder.parts("tokens"):
        counts += torch.bincount(tokens.long().flatten(), minlength=codebook_size)
    found["codebook_usage"], found["codebook_perplexity"] = codebook_usage(counts), codebook_perplexity(counts)
    return found


def _distances(folder: FeatureFolder, network: Network, reference: Reference | None) -> dict[str, float]:
    decoded, original = (f"{side}.{network.name}" for side in ("decoded", "original"))
    frechet, kernel = "frechet_distance", "kernel_distance"
    if network.inception:
        frechet, kernel = (f"r{INCEPTION_NAMES[name]}" for name in (frechet, kernel))
    real = folder.moments(original) if reference is None else reference.moments["pooled"]
    found = {frechet: frechet_distance(folder.moments(decoded), real)}
    vectors = folder.vectors(original) if reference is None else reference.vectors
    if vectors is not None:
        size = min(SUBSET, folder.count, len(vectors))
        found[kernel], found[f"{kernel}_std"] = kernel_distance(folder.vectors(decoded), vectors, subset_size=size)
    return found


def _doubts(
    count: int, source: ImageSource, facts: Mapping[str, Any], networks: Sequence[Network], reference: Reference | None
) -> list[str]:
    """What makes the numbers incomparable with published ones, in sentences."""
    found = []
    if count != IMAGES:
        found.append(
            f"the images are {count:,}, published numbers are of {IMAGES:,}: a Frechet distance falls as their number "
            "grows"
        )
    classes = len(source.class_names)
    if classes != CLASSES:
        found.append(
            f"the data {shown(source.name)} have {classes:,} {'class' if classes == 1 else 'classes'}, published "
            f"numbers are of ImageNet's validation images, which have {CLASSES:,}"
        )
    if source.name.endswith("/train"):
        found.append(f"the data {shown(source.name)} are a training split: a tokenizer may have been trained on them")
    if reference is not None and reference.kind == "ADM":
        found.append(ADM_DOUBT)
    elif reference is not None:
        found.append("the Frechet distance is from the statistics of a file, published rFID is from the originals")
    for network in networks:
        found += doubts_of_network(network.facts)
        if reference is not None:
            found += doubts_of_pairing({**network.facts, "size": facts["size"], "crop": facts["crop"]}, reference)
    net = facts["lpips"] and facts["lpips"]["network"]
    if net not in (None, PUBLISHED_LPIPS):
        found.append(f"LPIPS is in features of {net!r}, the published loss is in those of {PUBLISHED_LPIPS!r}")
    return found
