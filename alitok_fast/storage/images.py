"""Pictures in and out: tensors to uint8, labelled grids, PNG and npz files that appear whole or not at all."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from alitok_fast.storage.files import write_atomically
from alitok_fast.storage.text import shown

MARGIN, CAPTION = 4, 18  # pixels
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\0\0\0IEND\xaeB`\x82"
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) floats to (B, H, W, 3) uint8: clamped to [0, 1], times 255, truncated (as published).

    Raises RuntimeError for NaN or infinity, which would become black.
    """
    if not bool(torch.isfinite(images).all()):
        raise RuntimeError(
            "images: expected finite pixels, got NaN or infinity; the weights or the precision are at fault"
        )
    return (images.float().clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous().numpy()


def grid_size(
    count: int,
    columns: int,
    cell: tuple[int, int],
    captions: Sequence[str] | None = None,
    scale: int | None = None,
) -> tuple[int, int]:
    """Width and height in pixels of what `grid` makes of `count` images of `cell` (width, height)."""
    width, height = (side * _factor(cell, scale) for side in cell)
    rows = -(-count // columns)
    captioned = sum(any(captions[row * columns : (row + 1) * columns]) for row in range(rows)) if captions else 0
    return min(count, columns) * (width + MARGIN) + MARGIN, captioned * CAPTION + rows * (height + MARGIN) + MARGIN


def _factor(cell: tuple[int, int], scale: int | None) -> int:
    return scale if scale is not None else max(1, -(-96 // cell[0]))


def grid(
    images: Sequence[np.ndarray | Image.Image],
    columns: int,
    captions: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """A sheet of equally large RGB images ((H, W, 3) uint8 or PIL), row by row, each with its caption above it.

    `scale` enlarges every image by a whole factor; None picks one that makes images at least 96 pixels wide.
    A row of empty captions takes no room.
    """
    if not len(images):
        raise ValueError("images: expected at least one image, got none")
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    pictures = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
    cell = pictures[0].size
    cell_width, cell_height = (side * _factor(cell, scale) for side in cell)
    sheet = Image.new("RGB", grid_size(len(pictures), columns, cell, captions, scale), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    top = MARGIN
    for start in range(0, len(pictures), columns):
        row = range(start, min(start + columns, len(pictures)))
        caption_height = CAPTION if captions and any(captions[index] for index in row) else 0
        for column, index in enumerate(row):
            left = MARGIN + column * (cell_width + MARGIN)
            if captions and caption_height:
                text = _shorten(captions[index], cell_width, font)
                draw.text((left + cell_width / 2, top + 1), text, fill=INK, font=font, anchor="ma")
            enlarged = pictures[index].resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, top + caption_height))
        top += caption_height + cell_height + MARGIN
    return sheet


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    text = shown(text, limit=width)  # no character is narrower than a pixel
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


FORMATS = {  # by suffix: Pillow's name, and the most pixels that a side may have
    ".png": ("PNG", 2**31 - 1),
    ".jpg": ("JPEG", 65500),
    ".jpeg": ("JPEG", 65500),
    ".webp": ("WEBP", 16383),
    ".gif": ("GIF", 65535),
    ".bmp": ("BMP", 2**31 - 1),
    ".tif": ("TIFF", 2**31 - 1),
    ".tiff": ("TIFF", 2**31 - 1),
    ".ppm": ("PPM", 2**31 - 1),
}


def check_image_name(path: Path, size: tuple[int, int] | None = None, argument: str = "path") -> str:
    """The format that the suffix of `path` names, by Pillow's name; `argument` is what errors call the path.

    Raises ValueError for a suffix of no format that is written here, a folder that is not there, or a picture of
    `size` (width, height) pixels that is too large for the format.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{argument}: expected a file ending in {', '.join(FORMATS)}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{argument}: expected a file in a folder that exists, got {path}")
    kind, largest = FORMATS[path.suffix.lower()]
    if size is not None and max(size) > largest:
        raise ValueError(
            f"{argument}: expected at most {largest} pixels a side in {kind}, got {size[0]} x {size[1]} for {path}; a "
            ".png may be larger"
        )
    return kind


def write_image(path: Path, image: np.ndarray | Image.Image) -> None:
    """Write one picture in the format that the suffix names."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    _write_picture(path, picture, check_image_name(path, picture.size))


def _write_picture(path: Path, picture: Image.Image, kind: str, **options) -> None:
    encoded = io.BytesIO()  # writing to a full disk itself, Pillow only says "encoder error -2"
    picture.save(encoded, format=kind, **options)
    write_atomically(path, lambda temporary: temporary.write_bytes(encoded.getbuffer()))


def is_whole_png(path: Path, side: int) -> bool:
    """Whether `path` is a PNG of `side` x `side` pixels that begins and ends as it should; the middle is not read."""
    try:
        with path.open("rb") as file:
            head = file.read(24)  # signature, then length and name of the first chunk, width, height
            file.seek(max(0, path.stat().st_size - len(PNG_END)))
            return head == PNG_START + struct.pack(">II", side, side) and file.read() == PNG_END
    except FileNotFoundError:
        return False


def write_film(path: Path, pictures: Sequence[Image.Image], seconds: float = 0.25, last: float = 3.0) -> None:
    """Write equally large pictures as one animation (.gif, .webp, .png), each shown `seconds` long, the last `last`."""
    kind = check_image_name(path)
    if kind not in ("GIF", "WEBP", "PNG"):
        raise ValueError(f"path: expected a file ending in .gif, .webp or .png, got {path}")
    times = [round(1000 * seconds)] * (len(pictures) - 1) + [round(1000 * last)]
    options = {"save_all": True, "append_images": list(pictures[1:]), "duration": times, "loop": 0}
    _write_picture(path, pictures[0], kind, **options)


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write one array for `np.load`."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
            file.write(np.ascontiguousarray(array).data)  # unlike array.tofile, it says that a disk is full

    write_atomically(path, write)


def write_npz(path: Path, images: Iterable[np.ndarray], shape: tuple[int, int, int, int], labels: np.ndarray) -> None:
    """Write ADM's sample file, uncompressed: `arr_0` (n, H, W, 3) uint8 and `labels` (n,) int64.

    `images` yields pieces (b, H, W, 3) in order, which are written as they come, so that 50,000 images need the memory
    of one piece. Raises ValueError when the pieces do not add up to `shape`.
    """

    def write(temporary: Path) -> None:
        written = 0
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(file, header)
                for piece in images:
                    if piece.dtype != np.uint8 or piece.shape[1:] != shape[1:]:
                        raise ValueError(
                            f"images: expected uint8 pieces of {shape[1:]}, got {piece.dtype} {piece.shape[1:]}"
                        )
                    file.write(np.ascontiguousarray(piece).data)
                    written += len(piece)
            with archive.open("labels.npy", "w") as file:
                npy.write_array(file, np.asarray(labels, dtype=np.int64))
        if written != shape[0]:
            raise ValueError(f"images: expected {shape[0]} in all, got {written}")

    write_atomically(path, write)
