"""Pictures that clients send and get: base64 to pixels within limits, pixels to PNG."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from alitok_fast.data.pictures import PixelGate, UnreadableImageError, decode_image, open_picture
from alitok_fast.data.transforms import centre_crop
from alitok_fast.serving.errors import FieldError

MOST_SCANS = 100  # of a JPEG: each costs a pass over all pixels, and a few bytes; encoders make about ten
START_OF_SCAN = b"\xff\xda"  # within a scan another byte follows 0xff
SETTINGS_KEY = "alitok_fast"  # of the text in a PNG


class PictureReader:
    """Reads pictures of at most `max_pixels`, several at a time within that number together."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._gate = PixelGate(max_pixels)

    def crop(self, encoded: str, size: int) -> np.ndarray:
        """The centre crop (size, size, 3) uint8 of a picture in base64 or as a data URL. Raises FieldError."""
        _, comma, data = encoded.partition(",") if encoded.startswith("data:") else ("", ",", encoded)
        if not comma:
            raise FieldError("image", "expected base64 after 'data:...,', got no comma")
        try:
            file = base64.b64decode(re.sub(r"\s", "", data), validate=True)
        except (binascii.Error, ValueError):
            message = (
                "expected the picture in base64 or as a data URL (addresses are not fetched), got other characters"
            )
            raise FieldError("image", message) from None
        try:
            with open_picture(file, "image") as picture:
                pixels = picture.width * picture.height
                scans = file.count(START_OF_SCAN) if picture.format in ("JPEG", "MPO") else 1
        except UnreadableImageError as error:
            raise _of_field(error) from None
        if pixels > self._max_pixels:
            raise FieldError("image", f"expected at most {self._max_pixels} pixels, got {pixels}")
        if scans > MOST_SCANS:
            raise FieldError("image", f"expected a JPEG of at most {MOST_SCANS} scans, got {scans}")
        try:
            with self._gate.hold(pixels):  # the crop needs as much again
                return centre_crop(decode_image(file, "image"), size)
        except UnreadableImageError as error:
            raise _of_field(error) from None


def _of_field(error: UnreadableImageError) -> FieldError:
    return FieldError("image", str(error).removeprefix("image: "))


def png(pixels: np.ndarray, settings: dict[str, Any] | None = None) -> bytes:
    """(H, W, 3) uint8 as a PNG file, which carries the settings as text."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_text(SETTINGS_KEY, json.dumps(settings))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def base64_png(pixels: np.ndarray, settings: dict[str, Any] | None = None) -> str:
    return base64.b64encode(png(pixels, settings)).decode()
