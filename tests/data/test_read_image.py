"""A picture file means what a viewer shows, costs the memory that it needs, and starts nothing."""

from __future__ import annotations

import pickle
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from alitok_fast.data import UnreadableImageError, read_image
from alitok_fast.data.pictures import PixelGate, picture_suffixes
from alitok_fast.data.transforms import cache_crops, centre_crop, train_crop


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_orientation_is_applied_or_left_by_choice(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = Image.fromarray(np.indices((32, 64)).transpose(1, 2, 0)[..., [0, 1, 0]].astype(np.uint8) * 3)
    exif, path = Image.Exif(), tmp_path / f"a{suffix}"
    exif[0x0112] = orientation
    options = {".jpg": {"quality": 100}, ".webp": {"lossless": True}}.get(suffix, {})
    stored.save(path, exif=exif, **options)
    with Image.open(path) as opened:
        seen = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert (read_image(path) == seen).all()
    if suffix != ".tif":  # Pillow itself turns those
        assert read_image(path, apply_orientation=False).shape == (32, 64, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_keep_their_tones(tmp_path: Path, suffix: str) -> None:
    path, grey = tmp_path / f"a{suffix}", np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    if suffix == ".pgm":
        path.write_bytes(b"P5 64 64 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(path)
    assert (read_image(path) == (grey >> 8)[:, :, None]).all()


def test_sixteen_bits_where_white_is_zero(tmp_path: Path) -> None:
    grey = np.array([[0, 65535, 256]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [255, 0, 254]


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70000]])])
def test_numbers_without_a_meaning_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match="a.tif: .* expected 8 or 16 bits per channel, got"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_shown_on_white(tmp_path: Path, mode: str) -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = [255, 128, 0]  # black: opaque, half, not at all
    picture = Image.fromarray(pixels).convert("LA" if mode == "LA" else "RGBA")
    if mode == "P":
        picture = Image.fromarray(np.array([[0, 0, 1]], np.uint8)).convert("P")
        picture.putpalette([0, 0, 0, 200, 0, 0])
        picture.save(tmp_path / "a.png", transparency=1)
    else:
        picture.save(tmp_path / "a.png")
    expected = [0, 0, 255] if mode == "P" else [0, 127, 255]
    assert read_image(tmp_path / "a.png")[0, :, 1].tolist() == expected


def test_palettes_cmyk_and_the_first_of_several_frames(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    red.convert("CMYK").save(tmp_path / "a.tif")
    red.convert("1").save(tmp_path / "b.png")
    assert (read_image(tmp_path / "a.gif") == [255, 0, 0]).all()
    assert (read_image(tmp_path / "a.tif") == [255, 0, 0]).all()
    assert set(np.unique(read_image(tmp_path / "b.png"))) <= {0, 255}


def linear_profile() -> bytes:
    """An ICC profile with sRGB's colours (of D50) and a tone curve of gamma 1."""
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)

    def xyz(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(v * 65536) for v in values))

    text = b"linear\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": xyz(0.9642, 1, 0.8249),
        b"rXYZ": xyz(0.4360747, 0.2225045, 0.0139322),
        b"gXYZ": xyz(0.3850649, 0.7168786, 0.0971045),
        b"bXYZ": xyz(0.1430804, 0.0606169, 0.7141733),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", offset + len(data), len(value))
        data += value
    header = struct.pack(">I4sI4s4s4s", offset + len(data), bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_converted_or_left_by_choice(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    picture = Image.new("RGB", (4, 4), (55, 55, 55))
    (picture.quantize(4) if mode == "P" else picture.convert(mode)).save(path, icc_profile=linear_profile())
    srgb = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)  # 128
    assert np.abs(read_image(path).astype(float) - srgb).max() < 2
    assert (read_image(path, convert_profile=False) == 55).all()
    Image.new("RGB", (4, 4), (55, 55, 55)).save(path, icc_profile=b"no profile")
    assert (read_image(path) == 55).all()


def test_large_jpegs_are_decoded_at_the_size_that_is_needed(tmp_path: Path) -> None:
    wave = (127 + 100 * np.sin(np.indices((640, 960))[1] / 40)).astype(np.uint8)
    large, small = Image.fromarray(wave).convert("RGB"), tmp_path / "small.jpg"
    large.save(tmp_path / "large.jpg", quality=95)
    large.resize((150, 127)).save(small)  # less than 4 * 32: decoded whole, to the same pixels
    assert (read_image(small, image_size=32) == read_image(small)).all()
    whole, reduced = read_image(tmp_path / "large.jpg"), read_image(tmp_path / "large.jpg", image_size=32)
    assert whole.shape == (640, 960, 3) and reduced.shape == (80, 120, 3)
    difference = centre_crop(whole, 32).astype(float) - centre_crop(reduced, 32)
    assert np.abs(difference).max() <= 4


def test_no_picture_runs_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("photo.png", "photo.eps"):
        (tmp_path / name).write_bytes(page)
        with pytest.raises(UnreadableImageError, match="expected a readable image in one of AVIF"):
            read_image(tmp_path / name)
    assert not (tmp_path / "ran").exists() and ".eps" not in picture_suffixes()


def test_a_format_without_a_signature_goes_by_its_name(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.tga")
    assert read_image(tmp_path / "a.tga").shape == (4, 4, 3)
    (tmp_path / "a.tga").rename(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError):
        read_image(tmp_path / "a.png")


def test_the_gate_bounds_what_is_decoded_at_once() -> None:
    gate, held, most, lock = PixelGate(10), [0], [0], threading.Lock()
    all_there = threading.Barrier(6)

    def decode(pixels: int) -> None:
        all_there.wait()
        for _ in range(20):
            with gate.hold(pixels):
                with lock:
                    held[0] += pixels
                    most[0] = max(most[0], held[0] if pixels < 10 else 0)
                    assert pixels < 50 or held[0] == 50  # larger than the gate: alone
                with lock:
                    held[0] -= pixels

    threads = [threading.Thread(target=decode, args=(pixels,)) for pixels in (4, 4, 4, 4, 6, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < most[0] <= 10 and held[0] == 0
    assert pickle.loads(pickle.dumps(gate)).limit == 10


@pytest.mark.parametrize("shape", [(3, 40), (41, 3), (7, 90), (200, 9), (1, 12), (60, 5)])
@pytest.mark.parametrize("size", [4, 16])
def test_long_pictures_are_cropped_to_the_same_square(shape: tuple[int, int], size: int, monkeypatch) -> None:
    # Pillow clips between its two passes, whose order it chooses by the picture's shape: no value here overshoots.
    image = np.random.default_rng(0).integers(80, 176, (*shape, 3), np.uint8)
    monkeypatch.setattr("alitok_fast.data.transforms.LONGEST", 8)
    cropped = [centre_crop(image, size), cache_crops(image, size, 10)]
    cropped += [train_crop(image, size, np.random.default_rng(seed)) for seed in range(20)]
    monkeypatch.setattr("alitok_fast.data.transforms.LONGEST", 1000)
    whole = [centre_crop(image, size), cache_crops(image, size, 10)]
    whole += [train_crop(image, size, np.random.default_rng(seed)) for seed in range(20)]
    for one, two in zip(cropped, whole, strict=True):
        assert one.shape == two.shape and np.abs(one.astype(int) - two.astype(int)).max() <= 2


def test_a_very_long_picture_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *rest) -> Image.Image:
        asked.append(size)
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", watched)
    image = np.zeros((2, 200_000, 3), np.uint8)
    assert cache_crops(image, 256, 10).shape == (10, 256, 256, 3)
    assert train_crop(image, 256, np.random.default_rng(0)).shape == (256, 256, 3)
    assert max(max(size) for size in asked) <= 281  # 1.1 times 256
