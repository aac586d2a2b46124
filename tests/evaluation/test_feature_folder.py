"""Features in files: the same numbers from any number of processes, after any kill; never those of other images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from alitok_fast.evaluation.feature_folder import ABOUT, FeatureFolder, compute_features
from alitok_fast.evaluation.moments import Moments
from alitok_fast.storage.files import SUFFIX

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 4, 6, 3), np.uint8)
FACTS = {"images": "samples.npz", "network": "mean and size"}


def images(begin: int, end: int, size: int = 3) -> Iterator[np.ndarray]:
    for at in range(begin, end, size):
        yield IMAGES[at : min(at + size, end)]


def extractor(pixels: Tensor) -> dict[str, Tensor]:
    assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, 4, 6)
    return {"pooled": pixels.double().mean((2, 3)), "first": pixels[:, :, 0, 0].half()}


def whole(path: Path, **options) -> FeatureFolder:
    folder = FeatureFolder(path, 23, FACTS, chunk=5)
    folder.compute(images, extractor, **options)
    return folder


def test_features_of_all_images_in_order(tmp_path: Path) -> None:
    counted: list[int] = []
    folder = whole(tmp_path / "features", on_images=counted.append)
    expected = torch.from_numpy(IMAGES).double().mean((1, 2)).float()
    assert torch.equal(folder.vectors("pooled"), expected) and sum(counted) == 23 and folder.missing() == []
    assert torch.equal(folder.vectors("first"), torch.from_numpy(IMAGES[:, 0, 0]).float())
    got, exact = folder.moments("pooled"), Moments.of(expected)
    assert got.count == 23
    torch.testing.assert_close(got.covariance, exact.covariance, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_give_the_numbers_of_one(tmp_path: Path, world: int) -> None:
    alone = whole(tmp_path / "alone")
    for rank in reversed(range(world)):
        together = FeatureFolder(tmp_path / "together", 23, FACTS, chunk=5)
        together.compute(images, extractor, rank, world)
    first, second = alone.moments("pooled"), together.moments("pooled")
    assert torch.equal(first.mean, second.mean) and torch.equal(first.covariance, second.covariance)


def test_moments_do_not_depend_on_the_size_of_the_files(tmp_path: Path) -> None:
    """To the last bit, though sums of what each file has would."""
    values = torch.randn(2300, 3, generator=torch.Generator().manual_seed(0)) + 0.3
    found = []
    for chunk in (32, 700, 1000, 5000):
        folder = FeatureFolder(tmp_path / str(chunk), 2300, FACTS, chunk)
        for part in folder.chunks:
            folder.write(part, [{"pooled": values[part.start : part.stop]}])
        found.append(folder.moments("pooled"))
    assert all(torch.equal(other.covariance, found[0].covariance) for other in found)
    torch.testing.assert_close(found[0].covariance, values.double().T.cov(), rtol=1e-12, atol=1e-12)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    def ending(begin: int, end: int) -> Iterator[np.ndarray]:
        if begin >= 10:
            yield IMAGES[begin : begin + 1]
            raise KeyboardInterrupt
        yield from images(begin, end)

    folder = FeatureFolder(tmp_path / "features", 23, FACTS, chunk=5)
    with pytest.raises(KeyboardInterrupt):
        folder.compute(ending, extractor)
    assert [chunk.start for chunk in folder.missing()] == [10, 15, 20]
    with pytest.raises(ValueError, match="features: expected those of 23 images in .*features, 13 are missing"):
        folder.vectors("pooled")
    asked: list[int] = []

    def noted(begin: int, end: int) -> Iterator[np.ndarray]:
        asked.append(begin)
        return images(begin, end)

    again = FeatureFolder(tmp_path / "features", 23, FACTS, chunk=5)
    again.compute(noted, extractor)
    assert asked == [10, 15, 20]
    assert torch.equal(again.vectors("pooled"), whole(tmp_path / "other").vectors("pooled"))


def test_several_networks_see_each_image_once(tmp_path: Path) -> None:
    """Also where one of them is done already, or has begun."""
    done = whole(tmp_path / "done")
    begun = FeatureFolder(tmp_path / "begun", 23, {"network": "minimum"}, chunk=5)
    begun.compute(images, lambda pixels: {"pooled": pixels.amin((2, 3)).float()}, 0, 2)
    asked: list[int] = []

    def noted(begin: int, end: int) -> Iterator[np.ndarray]:
        asked.append(begin)
        return images(begin, end)

    third = FeatureFolder(tmp_path / "third", 23, {"network": "maximum"}, chunk=5)
    smallest, largest = (
        (lambda pixels: {"pooled": pixels.amin((2, 3))}),
        (lambda pixels: {"pooled": pixels.amax((2, 3))}),
    )
    compute_features([(done, extractor), (begun, smallest)], noted)
    assert asked == [5, 15]
    compute_features([(begun, smallest), (third, largest)], noted)
    assert asked == [5, 15, 0, 5, 10, 15, 20]
    values = torch.from_numpy(IMAGES).float()
    assert torch.equal(begun.vectors("pooled"), values.amin((1, 2)))
    assert torch.equal(third.vectors("pooled"), values.amax((1, 2)))
    with pytest.raises(ValueError, match="features: expected folders of the same images"):
        compute_features([(third, largest), (FeatureFolder(tmp_path / "x", 22, {}, chunk=5), largest)], noted)


def test_a_run_killed_at_its_very_beginning_goes_on(tmp_path: Path) -> None:
    (tmp_path / f".{ABOUT}{SUFFIX}").write_text("{")
    assert whole(tmp_path).missing() == []


@pytest.mark.parametrize(
    ("count", "facts", "chunk", "message"),
    [
        (23, {**FACTS, "images": "others.npz"}, 5, "facts.images: expected 'samples.npz', got 'others.npz'"),
        (22, FACTS, 5, "count: expected 23, got 22"),
        (23, FACTS, 6, "chunk: expected 5, got 6"),
    ],
)
def test_features_of_other_images_are_never_mixed(tmp_path: Path, count: int, facts, chunk: int, message: str) -> None:
    whole(tmp_path / "features")
    with pytest.raises(ValueError, match=f"features: .* holds those of other images or settings .{message}"):
        FeatureFolder(tmp_path / "features", count, facts, chunk)


def test_bad_folders_and_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"features: expected a new folder or one with {ABOUT}, got .* other things"):
        FeatureFolder(tmp_path, 3, FACTS)
    with pytest.raises(ValueError, match="count, chunk: expected at least 1, got 0, 1000"):
        FeatureFolder(tmp_path / "features", 0, FACTS)
    folder = FeatureFolder(tmp_path / "features", 24, FACTS, chunk=12)
    with pytest.raises(ValueError, match="images: expected 12 from 12 on, got 11"):
        folder.compute(images, extractor)
    folder = whole(tmp_path / "whole")
    with pytest.raises(ValueError, match="features: expected 'spatial' of 5 images in"):
        folder.vectors("spatial")
    (tmp_path / "whole" / "00000005.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="00000005.safetensors: expected a complete"):
        folder.moments("pooled")
