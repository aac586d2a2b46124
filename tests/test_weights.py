"""The weights that ship with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import alitok_fast
from alitok_fast.models.loading import load_tokenizer
from alitok_fast.pipelines.reconstruction import reconstruct

WEIGHTS = Path(alitok_fast.__file__).parent / "weights"
MOST_BYTES = 24_000_000  # of a wheel


def test_all_of_them_are_small():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= MOST_BYTES


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_colour_photographs_come_back(name: str):
    """Photographs that the tokenizer has not learned from, cut into tiles."""
    data = pytest.importorskip("skimage.data")
    result = reconstruct(load_tokenizer("photos-64"), getattr(data, name)(), tile=True)
    assert result.psnr >= 24
    colours = (image.astype(np.float64).mean((0, 1)) for image in (result.original, result.image))
    assert np.abs(np.subtract(*colours)).max() < 6  # of 255; a grey picture's are off by 19 to 61
