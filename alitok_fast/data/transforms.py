"""From RGB uint8 arrays (H, W, 3) to square ones of the model's size, and to tensors in [0, 1].

Published preparation, to the pixel: training resizes with a bilinear filter and crops at random; evaluation and token
caches take ADM's centre crop (Dhariwal and Nichol 2021), and for ten crops that of an image 1.1 times larger.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alitok_fast.data.checks import require_choice, require_count

PREPARATION = 2
"""Counts up where the same picture gives other crops: 1 was alitok_fast's own, 2 is the published one."""
CACHE_SCALE = 1.1  # the cached crops are cut from an image this much larger than the crop
CROP_COUNTS = (1, 2, 10)
LONGEST = 64  # of the shorter side; longer pictures are cropped before they are resized
BICUBIC, BILINEAR, BOX = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.BOX


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(255)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """ADM's centre crop, (size, size, 3).

    The image is halved by a box filter while its shorter side is at least twice `size`, resized by a bicubic one so
    that its shorter side is `size`, and the middle is cut out.
    """
    require_count("size", size)
    while min(image.shape[:2]) >= 2 * size:
        halves = image.shape[1] // 2, image.shape[0] // 2
        image = np.asarray(Image.fromarray(image).resize(halves, BOX))
    scale = size / min(image.shape[:2])
    height, width = (round(side * scale) for side in image.shape[:2])
    return _square(image, size, (height, width), ((height - size) // 2, (width - size) // 2), BICUBIC)


def train_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Training augmentation, (size, size, 3).

    Antialiased bilinear resize to a shorter side of `size`, random crop, horizontal flip with probability 1/2.
    """
    shorter = min(image.shape[:2])
    require_count("size", size)
    height, width = (int(size * side / shorter) for side in image.shape[:2])
    corner = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    crop = _square(image, size, (height, width), corner, BILINEAR)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def cache_crops(image: np.ndarray, size: int, crops: int = 10) -> np.ndarray:
    """The crops whose tokens are cached, (crops, size, size, 3).

    1: the centre. 2: the centre and its mirror image. 10: top left, top right, bottom left, bottom right and centre
    of a centre crop int(1.1 * size) pixels wide, then the same five of its mirror image.
    """
    require_choice("crops", crops, CROP_COUNTS)
    if crops < 10:
        centre = centre_crop(image, size)
        return np.stack([centre, centre[:, ::-1]][:crops])
    larger = centre_crop(image, int(size * CACHE_SCALE))
    far = larger.shape[0] - size
    middle = round(far / 2)
    corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    both = (larger, larger[:, ::-1])
    return np.stack([view[top : top + size, left : left + size] for view in both for top, left in corners])


def _square(
    image: np.ndarray, size: int, shape: tuple[int, int], corner: tuple[int, int], resample: Image.Resampling
) -> np.ndarray:
    """The size x size pixels at `corner` (top, left) of the image resized to `shape` (height, width).

    A picture longer than 64 times its width is first cropped to what the square shows, to the same pixels within two
    grey levels: resized whole, 2 x 200,000 pixels would be 26 GB.
    """
    (height, width), (tall, wide), (top, left) = image.shape[:2], shape, corner
    if max(height, width) > LONGEST * min(height, width):
        rows, above = _shown(height, tall, top, size)
        columns, before = _shown(width, wide, left, size)
        part = Image.fromarray(np.ascontiguousarray(image[rows, columns]))
        right, below = before + size * width / wide, above + size * height / tall
        box = (before, above, min(right, part.width), min(below, part.height))
        return np.asarray(part.resize((size, size), resample, box))
    if image.shape[:2] != shape:
        image = np.asarray(Image.fromarray(image).resize((wide, tall), resample))
    return image[top : top + size, left : left + size]


def _shown(side: int, resized: int, first: int, size: int) -> tuple[slice, float]:
    """The pixels of one side that `size` resized ones from `first` on are made of, and where in them those begin."""
    scale = side / resized
    margin = 2 * max(1.0, scale) + 1  # bicubic: two pixels of the coarser grid to each side
    begin, end = max(0, int(first * scale - margin)), min(side, math.ceil((first + size) * scale + margin))
    return slice(begin, end), first * scale - begin
