"""Photographs as encoded pictures, and what writes them into shards."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def jpegs() -> list[bytes]:
    """Four photographs of scikit-image, 60 x 48 pixels, as JPEG."""
    data = pytest.importorskip("skimage.data")
    found = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        file = io.BytesIO()
        Image.fromarray(getattr(data, name)()).resize((60, 48)).save(file, "JPEG", quality=92)
        found.append(file.getvalue())
    return found


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[..., Path]:
    """write_shard("x.tar", {"__key__": "a", "jpg": bytes, "cls": 3}, ...) by webdataset's own writer."""
    wds = pytest.importorskip("webdataset")

    def write(name: str, *samples: dict) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with wds.TarWriter(str(path), mtime=0) as writer:
            for sample in samples:
                writer.write(sample)
        return path

    return write
