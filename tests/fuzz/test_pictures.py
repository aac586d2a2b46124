"""Damaged pictures: each read gives an RGB array or UnreadableImageError naming the file, and runs no other program."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from alitok_fast.data import UnreadableImageError, read_image
from alitok_fast.data.pictures import check_image

FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "JPEG2000", "AVIF", "QOI")


def encoded() -> list[tuple[str, bytes]]:
    """Small pictures of every format that this Pillow writes, with EXIF, palettes, transparency and 16 bits."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (5, 7)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for kind in FORMATS:
        for picture in (colour, colour.convert("L"), colour.convert("P"), colour.convert("RGBA"), grey16):
            for options in ({}, {"exif": exif}, {"compression": "tiff_lzw"}):
                file = io.BytesIO()
                try:
                    picture.save(file, kind, **options)
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # this format has no such pictures
                found.append((f".{kind.lower().replace('jpeg2000', 'jp2')}", file.getvalue()))
    return found


PICTURES = encoded()


@st.composite
def damaged(draw) -> tuple[str, bytes]:
    """A picture with bytes changed, cut, doubled or taken from another one, mostly near its beginning."""
    suffix, data = draw(st.sampled_from(PICTURES))
    raw = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        end = draw(st.sampled_from((32, 128, len(raw)))) if raw else 0
        at = draw(st.integers(0, max(0, min(end, len(raw)) - 1)))
        what = draw(st.sampled_from(("byte", "word", "cut", "double", "splice")))
        if what == "byte" and raw:
            raw[at] = draw(st.integers(0, 255))
        elif what == "word":
            raw[at : at + 4] = draw(
                st.sampled_from((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\1\0"))
            )
        elif what == "cut":
            del raw[at:]
        elif what == "double":
            raw[at:at] = raw[at : at + draw(st.integers(1, 64))]
        else:
            raw[at:] = draw(st.sampled_from(PICTURES))[1][at:]
    return suffix, bytes(raw)


def check(folder: Path, suffix: str, data: bytes) -> None:
    path = folder / f"picture{suffix}"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about damaged metadata
        for options in ({}, {"apply_orientation": False, "convert_profile": False, "image_size": 2}):
            try:
                picture = read_image(path, **options)
            except UnreadableImageError as error:
                assert str(path) in str(error) and len(str(error).splitlines()) == 1
            else:
                assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size
        try:
            check_image(path)
        except UnreadableImageError as error:
            assert str(path) in str(error)


COMMON = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


def test_the_undamaged_ones_are_read(folder: Path) -> None:
    assert {suffix for suffix, _ in PICTURES} >= {".png", ".jpeg", ".gif", ".tiff", ".bmp", ".ppm", ".tga"}
    for suffix, data in PICTURES:
        path = folder / f"whole{suffix}"
        path.write_bytes(data)
        assert read_image(path).shape in {(9, 13, 3), (13, 9, 3), (5, 7, 3), (7, 5, 3)}


@settings(max_examples=300, **COMMON)
@given(damaged())
def test_damaged_pictures(folder: Path, picture: tuple[str, bytes]) -> None:
    check(folder, *picture)


@pytest.mark.slow
@settings(max_examples=3000, **COMMON)
@given(damaged())
def test_many_damaged_pictures(folder: Path, picture: tuple[str, bytes]) -> None:
    check(folder, *picture)
