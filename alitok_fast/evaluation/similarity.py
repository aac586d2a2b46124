"""How alike a reconstruction and its image are, image by image: SSIM, and LPIPS with what could change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alitok_fast.models.perceptual import lpips_distance
from alitok_fast.storage.files import weights_fingerprint

WINDOW, SIGMA = 11, 1.5  # pixels
DYNAMIC_RANGE = 255
K1, K2 = 0.01, 0.03
SSIM = f"Gaussian window of {WINDOW} x {WINDOW} pixels, sigma {SIGMA}, each channel, pixels of 0 to {DYNAMIC_RANGE}"


def ssim(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity of each image, (B,) float64, at most 1: Wang et al. 2004 (doi 10.1109/TIP.2003.819861).

    Gaussian window of 11 x 11 pixels with sigma 1.5, K = (0.01, 0.03), a range of 255; the mean over the places where
    the window lies within the image, and over channels. It is scikit-image's `structural_similarity` with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False and data_range=255.

    Args:
        images: (B, C, H, W) uint8, H and W >= 11.
        reconstruction: the same.

    Raises:
        TypeError, ValueError: for others.
    """
    _check_pair(images, reconstruction)
    if min(images.shape[2:]) < WINDOW:
        raise ValueError(f"images: expected at least {WINDOW} pixels a side, got {tuple(images.shape)}")
    x, y = (values.double().flatten(0, 1)[:, None] for values in (images, reconstruction))
    distance = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    window = torch.exp(-((distance / SIGMA) ** 2) / 2)
    window /= window.sum()

    def local_mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = ((k * DYNAMIC_RANGE) ** 2 for k in (K1, K2))
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    found = alike / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return found.view(len(images), -1).mean(1)


@dataclass(frozen=True)
class Lpips:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) of uint8 images, and the facts that could change it."""

    facts: Mapping[str, Any]
    device: torch.device
    distance: nn.Module

    @classmethod
    def load(
        cls,
        net: str = "vgg",
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
        option: str = "weights",
    ) -> Lpips:
        """`net`, `weights` and `option` as for `alitok_fast.models.perceptual.lpips_distance`, which raises."""
        distance: Any = lpips_distance(net, weights, option=option).to(device)
        facts = {
            "network": net,
            "weights": weights_fingerprint(distance.network.state_dict()),
            "library": f"lpips {version('lpips')}",
        }
        return cls(facts, torch.device(device), distance)

    def __call__(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """images, reconstruction (B, 3, H, W) uint8 on any device -> (B,) float32, without TF32; TypeError, ValueError
        for others."""
        _check_pair(images, reconstruction)
        pair = (values.to(self.device).float() / 255 for values in (images, reconstruction))
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.distance(*pair)


def _check_pair(images: Tensor, reconstruction: Tensor) -> None:
    for name, values in (("images", images), ("reconstruction", reconstruction)):
        if values.dtype != torch.uint8:
            raise TypeError(f"{name}: expected uint8, got {values.dtype}")
    if images.ndim != 4:
        raise ValueError(f"images: expected shape (B, C, H, W), got {tuple(images.shape)}")
    if images.shape != reconstruction.shape:
        raise ValueError(f"reconstruction: expected shape {tuple(images.shape)}, got {tuple(reconstruction.shape)}")
