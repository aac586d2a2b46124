"""One encoded picture, a file or its bytes, to an RGB array that means what a viewer shows.

- The EXIF orientation is applied and colour profiles are converted to sRGB. Large JPEGs are decoded at a reduced size
  where that is enough. The published preparation does none of the three: `apply_orientation=False`,
  `convert_profile=False` and `image_size=None` read opaque pictures of 8 bits as it does, to the pixel.
- 16-bit grey is scaled to 8 bits (v >> 8). Other integers and floats, which viewers do not agree on, are refused.
- Transparent pixels are shown on white (`BACKDROP`). CMYK without a profile takes Pillow's plain conversion.
- Of animations and files of several pages the first picture is read.

Formats are taken from a file's content, out of `FORMATS` alone: none of them starts another program.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import TiffImageFile

from alitok_fast.data.checks import require_count

BACKDROP = (255, 255, 255)
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
_NO_SIGNATURE = "TGA"  # any bytes may pass for one: only files that are called so are tried
_FLOATS = {".pfm"}
_ORIENTATION_TAG, _PHOTOMETRIC_TAG = 0x0112, 262
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded; the message names it."""


class PixelGate:
    """Lets threads decode at the same time only what stays below `limit` pixels together; a larger picture goes alone.

    A pixel takes about 8 bytes while it is decoded and converted. Worker processes have a gate each: a picture of more
    than a quarter of `limit` also waits for its turn among them, where `take_turns` has given them one.
    """

    def __init__(self, limit: int = 64_000_000) -> None:
        self.limit = require_count("limit", limit)
        self._held = 0
        self._changed = threading.Condition()

    def __reduce__(self):  # a lock belongs to its process
        return PixelGate, (self.limit,)

    @contextlib.contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + pixels <= self.limit)
            self._held += pixels
        try:
            with _process.turn if pixels > self.limit // 4 else contextlib.nullcontext():
                yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


class _Process:
    """What worker processes share: the turn of large pictures. Memory is the machine's, so this is the process's."""

    turn: contextlib.AbstractContextManager = contextlib.nullcontext()


_process = _Process()


def take_turns(lock: contextlib.AbstractContextManager) -> None:
    """In a worker process: decode large pictures only while holding `lock`, which its siblings share."""
    _process.turn = lock


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the files that the installed Pillow reads in one of `FORMATS`."""
    kinds = Image.registered_extensions()
    known = {kind for kind in FORMATS if kind in Image.OPEN} | {"MPO"}  # MPO is opened as JPEG
    return frozenset(suffix for suffix, kind in kinds.items() if kind in known) - _FLOATS


def read_image(
    path: str | Path,
    apply_orientation: bool = True,
    convert_profile: bool = True,
    image_size: int | None = None,
    gate: PixelGate | None = None,
) -> np.ndarray:
    """The picture as (H, W, 3) uint8 RGB; UnreadableImageError names a file that is none.

    `image_size`: the side in pixels of the square that it will be resized to. A JPEG whose shorter side is at least
    4 times that is decoded at 1/2, 1/4 or 1/8 of its size (Pillow's draft mode), with at least 2 times `image_size`
    left: libjpeg's scaling takes the place of the first halvings of ADM's centre crop, with crops that differ by one
    to three grey levels on average, and by more along hard edges. None decodes everything. `gate` bounds the memory of
    threads that read at the same time.
    """
    return decode_image(Path(path), str(path), apply_orientation, convert_profile, image_size, gate)


def decode_image(
    encoded: Path | bytes,
    name: str,
    apply_orientation: bool = True,
    convert_profile: bool = True,
    image_size: int | None = None,
    gate: PixelGate | None = None,
) -> np.ndarray:
    """As `read_image`, of a file or of the bytes of one; `name` is what errors call it, and has its suffix."""
    if image_size is not None:
        require_count("image_size", image_size)
    with open_picture(encoded, name) as picture:
        if image_size is not None:
            shorter = max(1, min(picture.size))
            wanted = [-(-side * 2 * image_size // shorter) for side in picture.size]
            picture.draft(None, (wanted[0], wanted[1]))
        with gate.hold(picture.width * picture.height) if gate else contextlib.nullcontext():
            picture.load()
            rgb = to_rgb(picture, convert_profile)
            if apply_orientation and (turn := _orientation(picture)) in _TRANSPOSITIONS:
                rgb = rgb.transpose(_TRANSPOSITIONS[turn])
            return np.asarray(rgb)


def check_image(encoded: Path | bytes, name: str = "", gate: PixelGate | None = None) -> None:
    """Decode a picture and drop it; UnreadableImageError names one that is none. A file needs no other name."""
    with (
        open_picture(encoded, name or str(encoded)) as picture,
        gate.hold(picture.width * picture.height) if gate else contextlib.nullcontext(),
    ):
        picture.load()


@contextlib.contextmanager
def open_picture(encoded: Path | bytes, name: str) -> Iterator[Image.Image]:
    """The picture, of an allowed format and not decoded yet; whatever its decoding raises is UnreadableImageError."""
    kinds = Image.registered_extensions()
    own = kinds.get(os.path.splitext(name)[1].lower())
    formats = [kind for kind in FORMATS if kind in Image.OPEN and (kind != _NO_SIGNATURE or kind == own)]
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=formats) as picture:
            yield picture
    except Image.UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"{name}: expected a readable image in one of {', '.join(FORMATS)}, got none"
        ) from error
    except Exception as error:  # on damaged files Pillow's plugins raise nearly anything
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UnreadableImageError(f"{name}: expected a readable image, got {found}") from error


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none; damaged metadata do not make a picture unreadable."""
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Pillow parses EXIF in Python: struct.error, SyntaxError, KeyError, ...
        return 1


def to_rgb(picture: Image.Image, convert_profile: bool) -> Image.Image:
    """A decoded picture in RGB, as above; ValueError for numbers that viewers do not agree on."""
    profile = picture.info.get("icc_profile") if convert_profile else None
    colour, alpha = _sixteen_bits(picture) if picture.mode.startswith("I") else _colour_and_alpha(picture)
    if profile:
        colour = _to_srgb(colour, profile)
    if colour.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        colour = ImageCms.profileToProfile(colour, lab, srgb, outputMode="RGB") or colour
    colour = colour if colour.mode == "RGB" else colour.convert("RGB")  # which would copy it
    if alpha is None:
        return colour
    return Image.composite(colour, Image.new("RGB", colour.size, BACKDROP), alpha)


def _colour_and_alpha(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if picture.mode == "F":
        raise ValueError("expected 8 or 16 bits per channel, got floating-point numbers")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        whole = picture.convert("RGBA")
        return whole.convert("RGB"), whole.getchannel("A")
    return (picture if picture.mode in ("L", "RGB", "CMYK", "LAB") else picture.convert("RGB")), None


def _sixteen_bits(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey, which Pillow calls I;16 or, of PNG and PGM files, I."""
    if picture.mode == "I" and picture.format not in ("PNG", "PPM"):
        raise ValueError("expected 8 or 16 bits per channel, got 32-bit integers")
    values, alpha = np.asarray(picture), None
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    if isinstance(picture, TiffImageFile) and picture.tag_v2.get(_PHOTOMETRIC_TAG) == 0:  # white is zero
        values = 65535 - values
    return Image.fromarray((values >> 8).astype(np.uint8)), alpha


def _to_srgb(colour: Image.Image, profile: bytes) -> Image.Image:
    """Through its colour profile to sRGB; as it is where the profile is sRGB, damaged or of other colours."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space not in _PROFILE_MODES or "sRGB" in ImageCms.getProfileDescription(source):
            return colour
        if (space == "CMYK") != (colour.mode == "CMYK") or (space == "Lab") != (colour.mode == "LAB"):
            return colour
        colour = colour.convert(_PROFILE_MODES[space])
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(colour, source, target, outputMode="RGB") or colour
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return colour
