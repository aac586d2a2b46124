"""Pictures: conversion to uint8, grids, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from alitok_fast.storage.images import check_image_name, grid, grid_size, to_uint8, write_film, write_image, write_npz


def test_values_are_clamped_and_truncated():
    images = torch.tensor([-1.0, 0.0, 0.999 / 255, 1.0 / 255, 254.999 / 255, 1.0, 2.0]).view(1, 1, 1, 7)
    assert to_uint8(images.expand(1, 3, 1, 7))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 254, 255, 255]


def test_channels_go_last():
    images = torch.rand(2, 3, 4, 5)
    array = to_uint8(images)
    assert array.shape == (2, 4, 5, 3) and array.dtype == np.uint8
    assert array[1, 2, 3, 0] == int(images[1, 0, 2, 3] * 255)


def test_grid_places_every_image_with_its_caption():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [np.full((8, 8, 3), colour, np.uint8) for colour in colours]
    bare, labelled = grid(images, 2, scale=4), grid(images, 2, ["a", "b", "c"], scale=4)
    for sheet in (bare, labelled):
        seen = {colour for _, colour in sheet.getcolors(1 << 16)}
        assert seen >= set(colours)
    pixels = np.asarray(bare)
    assert [tuple(pixels[y, x]) for y, x in ((20, 20), (20, 56), (56, 20))] == colours
    assert labelled.height > bare.height
    assert (np.asarray(labelled)[:16] < 255).any()  # ink above the first row


def test_grid_refuses_nothing():
    with pytest.raises(ValueError, match="images: expected at least one image, got none"):
        grid([], 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_written_pictures_read_back(tmp_path, suffix):
    image = np.full((16, 24, 3), 77, np.uint8)
    write_image(tmp_path / f"x{suffix}", image)
    with Image.open(tmp_path / f"x{suffix}") as picture:
        assert picture.size == (24, 16)
        assert abs(int(np.asarray(picture)[3, 3, 0]) - 77) < 3


def test_names_that_are_no_picture(tmp_path):
    with pytest.raises(ValueError, match="path: expected a file ending in .png, .jpg, .*, got .*x.txt"):
        write_image(tmp_path / "x.txt", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="expected a file in a folder that exists"):
        write_image(tmp_path / "no" / "x.png", np.zeros((2, 2, 3), np.uint8))


@pytest.mark.parametrize("suffix", [".psd", ".fits", ".xbm", ".eps", ""])
def test_formats_that_are_only_read_are_refused_before_the_work(tmp_path, suffix):
    with pytest.raises(ValueError, match="path: expected a file ending in .png"):
        check_image_name(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix, largest", [(".jpg", 65500), (".webp", 16383), (".gif", 65535)])
def test_pictures_too_large_for_their_format_are_refused_before_the_work(tmp_path, suffix, largest):
    assert check_image_name(tmp_path / f"x{suffix}", (largest, 10)) == check_image_name(tmp_path / f"x{suffix}")
    with pytest.raises(
        ValueError, match=f"at most {largest} pixels a side in .*, got {largest + 1} x 10 for .*x{suffix}"
    ):
        check_image_name(tmp_path / f"x{suffix}", (largest + 1, 10))


@pytest.mark.parametrize("captions", [None, ["a", "", "b", "c", ""], [""] * 5, ["", "", "", "x", ""]])
@pytest.mark.parametrize("columns, scale", [(2, None), (5, 3), (7, 1)])
def test_the_size_of_a_grid_is_known_before_it_is_made(captions, columns, scale):
    images = [np.zeros((20, 30, 3), np.uint8)] * 5
    assert grid(images, columns, captions, scale).size == grid_size(5, columns, (30, 20), captions, scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_are_finite(value):
    images = torch.zeros(2, 3, 4, 4)
    images[1, 2, 0, 0] = value
    with pytest.raises(RuntimeError, match="images: expected finite pixels, got NaN or infinity"):
        to_uint8(images)


def test_npz_is_written_in_pieces_and_read_by_numpy(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(7) % 3
    write_npz(tmp_path / "x.npz", iter([images[:3], images[3:6], images[6:]]), images.shape, labels)
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays.files == ["arr_0", "labels"]
        assert np.array_equal(arrays["arr_0"], images) and arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["labels"], labels) and arrays["labels"].dtype == np.int64


def test_npz_pieces_must_add_up(tmp_path):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="images: expected 4 in all, got 3"):
        write_npz(tmp_path / "x.npz", [images], (4, 4, 4, 3), np.zeros(4))
    with pytest.raises(ValueError, match=r"images: expected uint8 pieces of \(4, 4, 3\), got float32"):
        write_npz(tmp_path / "x.npz", [images.astype(np.float32)], (3, 4, 4, 3), np.zeros(3))
    assert not list(tmp_path.iterdir())


def test_films(tmp_path):
    pictures = [Image.new("RGB", (8, 6), (shade, 0, 0)) for shade in (0, 100, 200)]
    write_film(tmp_path / "f.gif", pictures, seconds=0.1, last=1)
    with Image.open(tmp_path / "f.gif") as film:
        assert (film.n_frames, film.size, film.info["duration"]) == (3, (8, 6), 100)
        film.seek(2)
        assert film.info["duration"] == 1000 and film.convert("RGB").getpixel((0, 0))[0] > 150
    with pytest.raises(ValueError, match=r"path: expected a file ending in .gif, .webp or .png, got .*f.bmp"):
        write_film(tmp_path / "f.bmp", pictures)
    assert [file.name for file in tmp_path.iterdir()] == ["f.gif"]
