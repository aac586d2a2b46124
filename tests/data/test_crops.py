"""Image preparation equals the published one, to the pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alitok_fast.data import open_source, read_image
from alitok_fast.data.transforms import cache_crops, centre_crop, train_crop
from alitok_fast.evaluation.judge import all_images
from alitok_fast.pipelines.reconstruction import reconstruct

GOLDEN = [
    (photo, kind, size)
    for photo in ("astronaut", "chelsea", "coffee")
    for kind in ("centre", "ten", "resize")
    for size in (256, 64)
    if size == 64 or photo == "astronaut" or kind == "centre"
]


def photograph(name: str) -> np.ndarray:
    return getattr(pytest.importorskip("skimage.data"), name)()


class Draws:
    """In place of numpy's generator: what it is asked for, and answers fixed beforehand."""

    def __init__(self, top: int, left: int, flip: bool) -> None:
        self._corner, self._flip, self.asked = [top, left], flip, []

    def integers(self, high: int) -> int:
        self.asked.append(high)
        return self._corner[len(self.asked) - 1]

    def random(self) -> float:
        return 0.0 if self._flip else 1.0


@pytest.mark.parametrize("photo, kind, size", GOLDEN)
def test_crops_equal_the_published_ones(golden: Path, photo: str, kind: str, size: int) -> None:
    image = photograph(photo)
    with np.load(golden / "transforms.npz") as outputs:
        expected = outputs[f"{photo}_{kind}_{size}"]
    if kind == "centre":
        assert np.array_equal(centre_crop(image, size), expected)
        assert np.array_equal(cache_crops(image, size, 1), expected[None])
        assert np.array_equal(cache_crops(image, size, 2), np.stack([expected, expected[:, ::-1]]))
    elif kind == "ten":
        assert np.array_equal(cache_crops(image, size, 10), expected)
    else:
        height, width = expected.shape[:2]
        for top, left, flip in [(0, 0, False), (height - size, width - size, False), (0, (width - size) // 2, True)]:
            draws = Draws(top, left, flip)
            crop = train_crop(image, size, draws)
            assert draws.asked == [height - size + 1, width - size + 1]
            assert np.array_equal(crop[:, ::-1] if flip else crop, expected[top : top + size, left : left + size])


def test_the_golden_file_holds_nothing_else(golden: Path) -> None:
    with np.load(golden / "transforms.npz") as outputs:
        assert set(outputs.files) == {f"{photo}_{kind}_{size}" for photo, kind, size in GOLDEN}


def test_the_longer_side_is_truncated() -> None:
    for (height, width), expected in {(100, 159): (10, 15), (159, 100): (15, 10), (300, 451): (10, 15)}.items():
        draws = Draws(0, 0, False)
        train_crop(np.zeros((height, width, 3), np.uint8), 10, draws)
        assert tuple(asked + 9 for asked in draws.asked) == expected


def test_pictures_are_halved_only_while_twice_the_size_is_left() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[::2, ::2] = 255  # each box of 2 x 2 has one bright pixel: their mean, 64, is what halving gives
    assert np.unique(centre_crop(image, 32)).tolist() == [64]
    assert np.unique(centre_crop(image, 16)).tolist() == [64]
    bicubic = np.asarray(Image.fromarray(image).resize((33, 33), Image.Resampling.BICUBIC))
    assert np.array_equal(centre_crop(image, 33), bicubic)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pictures_can_be_read_as_published(tmp_path: Path, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "cat"
    folder.mkdir()
    Image.fromarray(photograph("coffee")).convert(mode).save(folder / "a.jpg", exif=exif)
    with Image.open(folder / "a.jpg") as picture:
        expected = np.asarray(picture.convert("RGB"))
    published = {"apply_orientation": False, "convert_profile": False}
    assert np.array_equal(read_image(folder / "a.jpg", **published), expected)
    source = open_source(tmp_path, image_size=64, draft=False, **published)
    assert np.array_equal(source.image(0), expected)
    reduced = open_source(tmp_path, image_size=64, **published)
    assert reduced.image(0).shape == (200, 300, 3) and reduced.fingerprint() != source.fingerprint()


def test_evaluation_and_reconstruction_take_the_centre_crop(tiny_tokenizer) -> None:
    image, tokenizer = photograph("coffee"), tiny_tokenizer()
    expected = centre_crop(image, 16)

    class Source:
        def __len__(self) -> int:
            return 1

        def image(self, index: int) -> np.ndarray:
            return image

    assert np.array_equal(all_images(Source(), 16)[0].permute(1, 2, 0), expected)
    assert np.array_equal(reconstruct(tokenizer, image).original, expected)
