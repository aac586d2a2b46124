"""From RGB uint8 arrays (H, W, 3) to square ones of the model's size, and to tensors in [0, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CACHE_SCALE = 1.1  # the cached crops are cut from an image this much larger than the crop
CROP_COUNTS = (1, 2, 10)


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(255)


def resize_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bicubic resize so that the shorter side is `size` pixels; the same array when it already is."""
    height, width = image.shape[:2]
    if min(height, width) == size:
        return image
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))


def _crop(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    return image[top : top + size, left : left + size]


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle size x size pixels of the image resized so that its shorter side is `size`."""
    image = resize_shorter_side(image, size)
    return _crop(image, (image.shape[0] - size) // 2, (image.shape[1] - size) // 2, size)


def train_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Training augmentation: shorter side to `size`, random size x size crop, horizontal flip with probability 1/2."""
    image = resize_shorter_side(image, size)
    top = int(rng.integers(image.shape[0] - size + 1))
    left = int(rng.integers(image.shape[1] - size + 1))
    crop = _crop(image, top, left, size)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def cache_crops(image: np.ndarray, size: int, crops: int = 10) -> np.ndarray:
    """The crops whose tokens are cached, (crops, size, size, 3).

    1: the centre. 2: the centre and its mirror image. 10: the four corners
    and the centre of a centre crop 1.1 times larger, then their mirror images.
    """
    if crops not in CROP_COUNTS:
        raise ValueError(f"crops: expected one of {CROP_COUNTS}, got {crops}")
    if crops < 10:
        views = [centre_crop(image, size)]
    else:
        larger = centre_crop(image, round(size * CACHE_SCALE))
        far = larger.shape[0] - size
        corners = [(0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2)]
        views = [_crop(larger, top, left, size) for top, left in corners]
    if crops > 1:
        views += [view[:, ::-1] for view in views]
    return np.stack(views)
