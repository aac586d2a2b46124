"""Peak signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """PSNR of each image in dB, (B,), for images (B, C, H, W) in [0, 1]; infinite where they are equal."""
    if images.shape != reconstruction.shape:
        raise ValueError(f"reconstruction: expected shape {tuple(images.shape)}, got {tuple(reconstruction.shape)}")
    error = (images.double() - reconstruction.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error)
