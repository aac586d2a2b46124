"""What is wrong with one encoded picture, or unusual enough to be told."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from alitok_fast.data.pictures import PixelGate, UnreadableImageError, open_picture, to_rgb
from alitok_fast.storage.text import shown

UNREADABLE_KINDS = ("unreadable", "truncated")
KINDS = (*UNREADABLE_KINDS, "animated", "CMYK", "16-bit", "transparent", "tiny", "duplicate", "mislabelled")
_FILMS = frozenset({"GIF", "PNG", "WEBP", "AVIF", "TIFF"})  # an MPO has several frames and is one photograph
_CUT_SHORT = ("truncated", "end of file", "unexpected end", "eoferror", "not enough image data", "buffer is not large")
_BITS_TAG = 258
DIGEST = 16  # bytes
_PIECE = 1 << 20


class Fault(NamedTuple):
    kind: str
    detail: str


def content_digest(encoded: Path | bytes) -> bytes:
    """16 bytes that only equal files share."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    if isinstance(encoded, bytes):
        digest.update(encoded)
    else:
        with encoded.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.digest()


def picture_faults(encoded: Path | bytes, name: str, tiny: int) -> list[Fault]:
    """Faults of one picture, which is decoded whole; `tiny`: the shortest side in pixels that is none."""
    found = []
    try:
        with open_picture(encoded, name) as picture, PixelGate().hold(picture.width * picture.height):
            if picture.mode == "CMYK":
                found.append(Fault("CMYK", f"{picture.format}"))
            if _deep(picture):
                found.append(Fault("16-bit", f"{picture.format}, scaled to 8 bits"))
            if min(picture.size) < tiny:
                found.append(Fault("tiny", f"{picture.width} x {picture.height} pixels"))
            picture.load()
            if _lowest_alpha(picture) < 255:
                found.append(Fault("transparent", "shown on white"))
            to_rgb(picture, convert_profile=True)
            if picture.format in _FILMS and (frames := _frames(picture)) != "1":
                found.append(Fault("animated", f"{frames} pictures, of which the first is read"))
    except UnreadableImageError as error:
        text = str(error).removeprefix(f"{name}: ")
        size = len(encoded) if isinstance(encoded, bytes) else os.stat(encoded).st_size if encoded.is_file() else 1
        short = size == 0 or any(words in text.lower() for words in _CUT_SHORT)
        return [Fault("truncated" if short else "unreadable", shown(text if size else "an empty file", limit=300))]
    return found


def _frames(picture: Image.Image) -> str:
    try:
        return str(getattr(picture, "n_frames", 1))
    except Exception:  # what is damaged after the first picture harms nobody
        return "damaged"


def _deep(picture: Image.Image) -> bool:
    """Whether the file has more than 8 bits a channel, which Pillow narrows silently in colour pictures."""
    tags = getattr(picture, "tag_v2", None)
    if tags is not None and max(np.atleast_1d(tags.get(_BITS_TAG, 1))) > 8:
        return True
    modes = " ".join(str(tile[3]) for tile in getattr(picture, "tile", []) if len(tile) > 3)
    return picture.mode.startswith("I") or ";16" in modes


def _lowest_alpha(picture: Image.Image) -> int:
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        channel = picture.getchannel("A" if picture.mode in ("RGBA", "LA", "PA") else "a")
    elif "transparency" in picture.info and picture.mode in ("P", "L", "RGB", "1"):
        channel = picture.convert("RGBA").getchannel("A")
    else:
        return 255
    return int(np.asarray(channel).min())
