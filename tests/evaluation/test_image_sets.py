"""Sets of images: arrays and PNGs give the same pixels, in natural order; whatever changes a distance is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alitok_fast.data import open_source
from alitok_fast.data.transforms import centre_crop
from alitok_fast.evaluation.image_sets import CROP, CroppedImages, ImageSet, StoredImages

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), np.uint8)


def pngs(folder: Path, images: np.ndarray = IMAGES) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    (folder / "manifest.json").write_text("{}")
    return folder


def all_of(images: ImageSet) -> np.ndarray:
    return np.concatenate(list(images.batches(0, images.count)))


def test_arrays_and_pngs_give_the_same_pixels(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=IMAGES)
    np.save(tmp_path / "x.npy", IMAGES)
    pngs(tmp_path / "pictures")
    for name in ("x.npz", "x.npy", "pictures"):
        images = StoredImages.open(tmp_path / name, 5)
        assert (images.count, images.size, images.name) == (12, 6, name)
        assert np.array_equal(all_of(images), IMAGES)  # 2.png before 10.png
        assert [len(piece) for piece in images.batches(3, 11)] == [5, 3]
        assert np.array_equal(np.concatenate(list(images.batches(3, 11))), IMAGES[3:11])


def test_facts_follow_the_bytes(tmp_path: Path) -> None:
    first, second = pngs(tmp_path / "a"), pngs(tmp_path / "b")
    assert StoredImages.open(first, 4).facts == StoredImages.open(second, 2).facts
    (second / "11.png").replace(second / "12.png")
    renamed = StoredImages.open(second, 2).facts
    assert renamed != StoredImages.open(first, 4).facts
    Image.fromarray(IMAGES[0]).save(second / "12.png")
    assert StoredImages.open(second, 2).facts != renamed
    assert StoredImages.open(first, 4, limit=5).count == 5
    assert StoredImages.open(first, 4, limit=50).count == 12


def test_jpegs_and_others_are_refused_by_name(tmp_path: Path) -> None:
    folder = pngs(tmp_path / "pictures")
    Image.fromarray(IMAGES[0]).save(folder / "x.jpeg")
    with pytest.raises(
        ValueError, match=r"images: expected PNGs, got x.jpeg in .*; JPEG changes pixels and so a Frechet"
    ):
        StoredImages.open(folder, 4)
    shutil.move(folder / "x.jpeg", folder / "3.png")  # by its content, too
    with pytest.raises(ValueError, match="images: expected PNGs, got a JPEG, which changes pixels .* in .*3.png"):
        StoredImages.open(folder, 4)
    Image.fromarray(IMAGES[0]).save(folder / "3.png")
    Image.fromarray(IMAGES[0]).save(folder / "x.webp")
    with pytest.raises(ValueError, match="images: expected PNGs, got x.webp in .*pictures$"):
        StoredImages.open(folder, 4)
    (folder / "x.webp").unlink()
    (folder / "more").mkdir()
    with pytest.raises(ValueError, match="images: expected PNGs beside each other, got the folder more in"):
        StoredImages.open(folder, 4)


def test_other_files_are_named(tmp_path: Path) -> None:
    folder = pngs(tmp_path / "pictures")
    Image.fromarray(IMAGES[0, :, :4]).save(folder / "12.png")
    with pytest.raises(ValueError, match="--images: expected PNGs of one size, got 6 x 6 in 0.png and 4 x 6 in 12.png"):
        StoredImages.open(folder, 4, argument="--images")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="images: expected PNGs, got .*none without any"):
        StoredImages.open(tmp_path / "none", 4)
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="images: expected an npz or npy file or a folder of PNGs, got .*x.tar"):
        StoredImages.open(tmp_path / "x.tar", 4)
    np.save(tmp_path / "one.npy", IMAGES[:1])
    with pytest.raises(ValueError, match="images: expected at least 2 images, got 1 in"):
        StoredImages.open(tmp_path / "one.npy", 4)


def test_oblong_images_have_both_sides(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IMAGES[:, :, :4])
    assert StoredImages.open(tmp_path / "x.npy", 4).size == "4 x 6"
    assert StoredImages.open(pngs(tmp_path / "p", IMAGES[:, :, :4]), 4).size == "4 x 6"


def test_crops_of_a_data_set_are_adms(tmp_path: Path) -> None:
    photos = np.random.default_rng(1).integers(0, 256, (5, 20, 30, 3), np.uint8)
    (tmp_path / "data").mkdir()
    pngs(tmp_path / "data" / "class", photos)
    (tmp_path / "data" / "class" / "manifest.json").unlink()
    source = open_source(tmp_path / "data")
    images = CroppedImages(source, 8, 2, 2, "as stored")
    assert np.array_equal(all_of(images), np.stack([centre_crop(photo, 8) for photo in photos]))
    assert (images.count, images.facts["fingerprint"]) == (5, source.fingerprint())
    assert CROP.startswith("ADM")
