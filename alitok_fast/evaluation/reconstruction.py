"""What is measured of pictures and of what a tokenizer gives back, in evaluation and while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alitok_fast.data.loader import to_floats
from alitok_fast.data.sources import ImageSource
from alitok_fast.evaluation.codebook import codebook_perplexity, codebook_usage
from alitok_fast.evaluation.comparison import (
    IMAGES,
    INCEPTION_NAMES,
    SUBSET,
    doubts_of_network,
    doubts_of_pairing,
)
from alitok_fast.evaluation.feature_folder import FeatureFolder
from alitok_fast.evaluation.measures import frechet_distance, kernel_distance
from alitok_fast.evaluation.networks import Network
from alitok_fast.evaluation.psnr import psnr
from alitok_fast.evaluation.reference import Reference
from alitok_fast.evaluation.similarity import Lpips, ssim
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.image_encoder import ImageEncoder
from alitok_fast.storage.images import to_uint8
from alitok_fast.storage.text import shown

CLASSES = 1000  # of ImageNet
PUBLISHED_LPIPS = "vgg"
ADM_DOUBT = (
    "the reference is an npz in the ADM suite's form, and the suite's own are of ImageNet's training images, "
    "but rFID is measured from the validation images that were encoded (what was 1.90, 4.28 and 1.22 from ADM's was "
    "then 0.578, 2.11 and 0.53)"
)


class ReconstructionMeasure:
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


def image_measures(folder: FeatureFolder, codebook_size: int) -> dict[str, Any]:
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


def reconstruction_distances(folder: FeatureFolder, network: Network, reference: Reference | None) -> dict[str, float]:
    """Frechet and kernel distance of the reconstructions from the originals in the same folder, or from `reference`,
    which has moments of "pooled"; with Inception they are `rfid` and `rkid`."""
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


def reconstruction_doubts(
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
