"""From RGB uint8 arrays (H, W, 3) to square ones of the model's size, and to tensors in [0, 1]."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alitok_fast.data.checks import require_choice, require_count

CACHE_SCALE = 1.1  # the cached crops are cut from an image this much larger than the crop
CROP_COUNTS = (1, 2, 10)
LONGEST = 8  # of the shorter side; longer pictures are cropped before they are resized


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(255)


def _resized_shape(image: np.ndarray, size: int) -> tuple[int, int]:
    """(height, width) after a resize to a shorter side of `size`."""
    height, width = image.shape[:2]
    scale = require_count("size", size) / min(height, width)
    return max(size, round(height * scale)), max(size, round(width * scale))


def resize_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bicubic resize so that the shorter side is `size` pixels; the same array when it already is."""
    if min(image.shape[:2]) == size:
        return image
    height, width = _resized_shape(image, size)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _square(image: np.ndarray, size: int, top: int, left: int) -> np.ndarray:
    """The size x size pixels at (top, left) of the image resized so that its shorter side is `size`.

    A picture longer than 8 times its width is first cropped to what the square shows: resized whole, 2 x 200,000
    pixels would be 26 GB. Others are resized whole, so that every bit of them is as published.
    """
    height, width = image.shape[:2]
    if max(height, width) > LONGEST * min(height, width):
        tall, wide = _resized_shape(image, size)
        rows, above = _shown(height, tall, top, size)
        columns, before = _shown(width, wide, left, size)
        part = Image.fromarray(np.ascontiguousarray(image[rows, columns]))
        right, below = before + size * width / wide, above + size * height / tall
        box = (before, above, min(right, part.width), min(below, part.height))
        return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC, box))
    return resize_shorter_side(image, size)[top : top + size, left : left + size]


def _shown(side: int, resized: int, first: int, size: int) -> tuple[slice, float]:
    """The pixels of one side that `size` resized ones from `first` on are made of, and where in them those begin."""
    scale = side / resized
    margin = 2 * max(1.0, scale) + 1  # bicubic: two pixels of the coarser grid to each side
    begin, end = max(0, int(first * scale - margin)), min(side, math.ceil((first + size) * scale + margin))
    return slice(begin, end), first * scale - begin


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle size x size pixels of the image resized so that its shorter side is `size`."""
    height, width = _resized_shape(image, size)
    return _square(image, size, (height - size) // 2, (width - size) // 2)


def train_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Training augmentation: shorter side to `size`, random size x size crop, horizontal flip with probability 1/2."""
    height, width = _resized_shape(image, size)
    top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    crop = _square(image, size, top, left)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def cache_crops(image: np.ndarray, size: int, crops: int = 10) -> np.ndarray:
    """The crops whose tokens are cached, (crops, size, size, 3).

    1: the centre. 2: the centre and its mirror image. 10: the four corners
    and the centre of a centre crop 1.1 times larger, then their mirror images.
    """
    require_choice("crops", crops, CROP_COUNTS)
    if crops < 10:
        views = [centre_crop(image, size)]
    else:
        larger = centre_crop(image, round(size * CACHE_SCALE))
        far = larger.shape[0] - size
        corners = [(0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2)]
        views = [larger[top : top + size, left : left + size] for top, left in corners]
    if crops > 1:
        views += [view[:, ::-1] for view in views]
    return np.stack(views)
