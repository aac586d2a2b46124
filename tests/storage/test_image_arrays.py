"""Images out of npz and npy files in pieces: all of them, in order, in little memory, and damaged files by name."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from alitok_fast.storage.image_arrays import ImageArray
from alitok_fast.storage.images import write_npy, write_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3), np.uint8)


def written(folder: Path, kind: str, images: np.ndarray = IMAGES) -> Path:
    path = folder / f"images.{kind.rpartition(' ')[2]}"
    if kind == "npy":
        write_npy(path, images)
    elif kind == "our npz":
        write_npz(path, [images], images.shape, np.zeros(len(images)))
    else:
        (np.savez_compressed if kind == "compressed npz" else np.savez)(path, images)
    return path


@pytest.mark.parametrize("kind", ["npy", "our npz", "npz", "compressed npz"])
@pytest.mark.parametrize("size", [1, 4, 11, 50])
def test_all_images_come_in_order(tmp_path: Path, kind: str, size: int) -> None:
    array = ImageArray.open(written(tmp_path, kind))
    assert (array.count, array.height, array.width) == (11, 4, 6)
    pieces = list(array.batches(size))
    assert all(len(piece) <= size for piece in pieces) and np.array_equal(np.concatenate(pieces), IMAGES)
    assert np.array_equal(np.concatenate(list(array.batches(size, 3, 9))), IMAGES[3:9])
    assert list(array.batches(size, 5, 5)) == []


def test_little_memory(tmp_path: Path) -> None:
    path = written(tmp_path, "npz", np.zeros((200, 64, 64, 3), np.uint8))  # 2.4 MB
    tracemalloc.start()
    assert sum(len(piece) for piece in ImageArray.open(path).batches(8, 100)) == 100
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.6e6  # what is skipped is read in pieces, too


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IMAGES.astype(np.float32), r"--samples: expected uint8 images \(n, H, W, 3\), got float32 \(11, 4, 6, 3\)"),
        (IMAGES.transpose(0, 3, 1, 2).copy(), r"got uint8 \(11, 3, 4, 6\)"),
        (np.asfortranarray(IMAGES), r"got uint8 \(11, 4, 6, 3\) in Fortran's order"),
        (IMAGES[:, :0], r"got uint8 \(11, 0, 6, 3\)"),
        (np.array([None]), r"got object \(1,\)"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "other.npz", array)
    with pytest.raises(ValueError, match=message):
        ImageArray.open(tmp_path / "other.npz", "--samples")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="path: expected images in arr_0, got .*statistics.npz with mu"):
        ImageArray.open(tmp_path / "statistics.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="path: expected an npz file, got .*text.npz"):
        ImageArray.open(tmp_path / "text.npz")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match="path: expected an array, got .*text.npy"):
        ImageArray.open(tmp_path / "text.npy")
    path = written(tmp_path, "npy")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="images.npy: expected 11 images, got 9"):
        list(ImageArray.open(path).batches(5))
    with zipfile.ZipFile(tmp_path / "flipped.npz", "w") as archive:
        archive.write(written(tmp_path, "npy"), "arr_0.npy")
    data = bytearray((tmp_path / "flipped.npz").read_bytes())
    data[400] ^= 255
    (tmp_path / "flipped.npz").write_bytes(data)
    with pytest.raises(ValueError, match="expected an npz file, got .*flipped.npz .*CRC"):
        list(ImageArray.open(tmp_path / "flipped.npz").batches(50))


@pytest.mark.parametrize(("size", "begin", "end"), [(0, 0, 5), (2, -1, 5), (2, 6, 5), (2, 0, 12)])
def test_pieces_that_are_not_there(tmp_path: Path, size: int, begin: int, end: int) -> None:
    with pytest.raises(ValueError, match="batches: expected size >= 1 and 0 <= begin <= end <= 11, got"):
        list(ImageArray.open(written(tmp_path, "npy")).batches(size, begin, end))
