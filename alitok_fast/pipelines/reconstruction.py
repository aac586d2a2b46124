"""Photographs through the tokenizer and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alitok_fast import __version__
from alitok_fast.data.sources import UnreadableImageError, read_image
from alitok_fast.data.transforms import centre_crop, to_tensor
from alitok_fast.evaluation.psnr import psnr
from alitok_fast.models import Tokenizer
from alitok_fast.storage.images import BACKGROUND, grid, to_uint8

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reconstruction:
    """`original` as the tokenizer saw it and `image` as it came back, both (H, W, 3) uint8; `tokens` (tiles, N)."""

    original: np.ndarray
    image: np.ndarray
    tokens: Tensor

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB."""
        pair = (torch.tensor(image)[None].double() / 255 for image in (self.original, self.image))
        return float(psnr(*pair))


def reconstruct(tokenizer: Tokenizer, photo: np.ndarray, tile: bool = False, batch_size: int = 16) -> Reconstruction:
    """Encode and decode one photograph (H, W, 3) uint8.

    Its centre crop (`alitok_fast.data.transforms.centre_crop`, ADM's) has the tokenizer's size; with `tile` it keeps
    its resolution instead, and is cut into squares of that size, each a token sequence of its own (edges that fill no
    square are cropped off).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    size = tokenizer.config.image_size
    if tile:
        if min(photo.shape[:2]) < size:
            raise ValueError(f"photo: expected at least {size} pixels a side to tile, got {photo.shape[1::-1]}")
        original = _crop_to_multiple(photo, size)
    else:
        original = centre_crop(photo, size)
    tiles = _cut(original, size)
    tokens, decoded = [], []
    for start in range(0, len(tiles), batch_size):
        batch = to_tensor(tiles[start : start + batch_size]).to(tokenizer.device)
        tokens.append(tokenizer.encode(batch))
        decoded.append(to_uint8(tokenizer.decode(tokens[-1])))
    return Reconstruction(original, _join(np.concatenate(decoded), original.shape), torch.cat(tokens))


def reconstruct_files(
    tokenizer: Tokenizer, paths: Sequence[Path], tile: bool = False, batch_size: int = 16, on_error: str = "stop"
) -> dict[Path, Reconstruction]:
    """`reconstruct` for picture files. A file that cannot be read raises UnreadableImageError naming it, or is
    left out with a warning where on_error is "skip". Raises ValueError if none is left."""
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error: expected 'stop' or 'skip', got {on_error!r}")
    results = {}
    for path in paths:
        try:
            photo = read_image(path)
        except UnreadableImageError as error:
            if on_error == "stop":
                raise
            _log.warning("skipped %s", error)
            continue
        results[path] = reconstruct(tokenizer, photo, tile, batch_size)
    if not results:
        raise ValueError(f"photos: expected at least one readable picture, got none in {len(paths)} files")
    return results


def describe(results: Mapping[Path, Reconstruction], tile: bool) -> dict[str, Any]:
    """What was reconstructed and how well, as JSON values."""
    return {
        "photos": [
            {
                "file": str(path),
                "psnr": result.psnr if math.isfinite(result.psnr) else None,
                "tokens": result.tokens.numel(),
            }
            for path, result in results.items()
        ],
        "tile": tile,
        "versions": {"alitok_fast": __version__, "torch": torch.__version__},
    }


def side_by_side(results: Mapping[Path, Reconstruction]) -> Image.Image:
    """One row per photograph: the original, and its reconstruction with the PSNR."""
    rows = [
        grid([r.original, r.image], 2, [path.name, f"PSNR {r.psnr:.2f} dB, {r.tokens.numel()} tokens"])
        for path, r in results.items()
    ]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), BACKGROUND)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _crop_to_multiple(photo: np.ndarray, size: int) -> np.ndarray:
    height, width = (side // size * size for side in photo.shape[:2])
    top, left = (photo.shape[0] - height) // 2, (photo.shape[1] - width) // 2
    return photo[top : top + height, left : left + width]


def _cut(image: np.ndarray, size: int) -> np.ndarray:
    """(R * size, C * size, 3) to (R * C, size, size, 3)."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    return image.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


def _join(tiles: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    size = tiles.shape[1]
    rows, columns = shape[0] // size, shape[1] // size
    return tiles.reshape(rows, columns, size, size, 3).swapaxes(1, 2).reshape(shape)
