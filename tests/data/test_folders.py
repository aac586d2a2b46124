"""What of a folder is data, and that whatever is not is said; what a source must have."""

from __future__ import annotations

import logging
import os
import pickle
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from alitok_fast.data import FolderImages, check_source, open_source, source_fingerprint
from alitok_fast.data.idx import FASHION_MNIST_CLASSES
from alitok_fast.data.reading import read_ahead

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def put(tmp_path: Path):
    """put("cat", "a.png") writes a picture there."""
    picture = Image.new("RGB", (8, 8), "red")

    def write(*parts: str) -> None:
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format={".jfif": "JPEG", ".jpe": "JPEG"}.get(path.suffix.lower()))

    return write


def test_hidden_and_system_names_are_no_data(tmp_path: Path, put) -> None:
    for name in ("cat", "dog"):
        put(name, "a.jpg")
        put(name, ".ipynb_checkpoints", "a-checkpoint.jpg")
        (tmp_path / name / "._a.jpg").write_bytes(b"\0\5\x16\7")
        (tmp_path / name / "Thumbs.db").write_bytes(b"x")
        put(name, "@eaDir", "a.jpg", "SYNOPHOTO_THUMB_M.jpg")
    put("__MACOSX", "cat", "a.jpg")
    put("$RECYCLE.BIN", "a.jpg")
    said: list[str] = []
    source = open_source(tmp_path, report=said.append)
    assert source.class_names == ["cat", "dog"] and source.labels.tolist() == [0, 1]
    assert [path.name for path in source.paths] == ["a.jpg", "a.jpg"]
    assert len(said) == 1 and "2 pictures in 2 classes; left out: 10 hidden or system names (such as '" in said[0]


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jfif", ".jpe", ".tga", ".apng", ".jp2", ".avif", ".bmp", ".webp"])
def test_what_pillow_reads_is_taken(tmp_path: Path, put, suffix: str) -> None:
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    put("cat", f"a{suffix}")
    source = open_source(tmp_path)
    assert len(source) == 1 and source.image(0).shape == (8, 8, 3)


def test_what_is_left_out_is_said_once_in_numbers(tmp_path: Path, put, caplog: pytest.LogCaptureFixture) -> None:
    put("cat", "a.png")
    put("cat", "deep", "b.png")
    put("c.png")
    put("d.png")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.INFO):
        source = open_source(tmp_path)
    assert [path.name for path in source.paths] == ["a.png", "b.png"] and source.class_names == ["cat"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (
        "2 pictures in 1 class",
        "2 pictures beside the class folders (such as 'c.png')",
        "1 file of another kind (such as 'notes.txt')",
        "1 folder without pictures (such as 'empty')",
    ):
        assert part in record.getMessage()


def test_linked_folders_are_entered_once(tmp_path: Path, put) -> None:
    put("data", "cat", "a.png")
    put("elsewhere", "b.png")
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "round").symlink_to(tmp_path / "data" / "cat")
    source = open_source(tmp_path / "data")
    assert [path.name for path in source.paths] == ["a.png", "b.png"]
    assert "1 link to a folder that was read already (such as 'round')" in source.summary


def test_splits(tmp_path: Path, put) -> None:
    for name in "abc":
        put("train", name, "x.png")
    for name in "ac":
        put("test", name, "x.png")
    (tmp_path / "annotations").mkdir()
    test = open_source(tmp_path, "test")
    assert test.class_names == open_source(tmp_path).class_names == ["a", "b", "c"] and test.labels.tolist() == [0, 2]
    assert test.name == f"{tmp_path.name}/test" and "2 pictures in 2 of 3 classes" in test.summary
    with pytest.raises(ValueError, match="split: expected one of 'test', 'train', the splits in .*, got 'trian'"):
        open_source(tmp_path, "trian")


def test_classes_are_not_splits(tmp_path: Path, put) -> None:
    for name in ("bus", "train"):  # vehicles
        put(name, "x.png")
    assert open_source(tmp_path).class_names == ["bus", "train"]
    with pytest.raises(ValueError, match="split: expected 'train', since .* holds no splits, got 'test'"):
        open_source(tmp_path, "test")


def test_splits_without_classes(tmp_path: Path, put) -> None:
    put("train", "x.png")
    put("val", "y.png")
    source = open_source(tmp_path, "val")
    assert source.class_names == [tmp_path.name] and [path.name for path in source.paths] == ["y.png"]


def test_one_name_in_two_spellings_is_one_class(tmp_path: Path, put) -> None:
    put("train", unicodedata.normalize("NFC", "é"), "x.png")
    put("val", unicodedata.normalize("NFD", "é"), "x.png")
    assert open_source(tmp_path).class_names == open_source(tmp_path, "val").class_names == ["é"]


def test_a_folder_source_goes_to_worker_processes(tmp_path: Path, put) -> None:
    put("cat", "a.png")
    source = pickle.loads(pickle.dumps(FolderImages(tmp_path)))
    assert source.image(0).shape == (8, 8, 3)


def test_fingerprints_follow_the_data_and_how_they_are_read(tmp_path: Path, put) -> None:
    put("cat", "a.png")
    put("dog", "b.png")
    first = source_fingerprint(open_source(tmp_path))
    assert first == source_fingerprint(open_source(tmp_path))
    assert first != source_fingerprint(open_source(tmp_path, apply_orientation=False))
    os.rename(tmp_path / "dog" / "b.png", tmp_path / "cat" / "b.png")
    put("dog", "c.png")
    moved = source_fingerprint(open_source(tmp_path))
    pixels = np.full((8, 8, 3), 9, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "dog" / "c.png")
    assert len({first, moved, source_fingerprint(open_source(tmp_path))}) == 3


# ---- IDX ----


def write_idx(folder: Path, labels: list[int]) -> Path:
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte").write_bytes(
        struct.pack(">IIII", 0x803, len(labels), 4, 4) + bytes(16 * len(labels))
    )
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + bytes(labels))
    return folder


@pytest.mark.parametrize(
    "place, garments",
    [("FashionMNIST/raw", True), ("fashion-mnist", True), ("fashionista/MNIST/raw", False), ("MNIST/raw", False)],
)
def test_names_of_a_part_of_fashion_mnist(tmp_path: Path, place: str, garments: bool) -> None:
    """Digits under somebody's "fashionista" are no garments."""
    names = open_source(write_idx(tmp_path / place, list(range(10)))).class_names
    assert names == (list(FASHION_MNIST_CLASSES) if garments else [str(i) for i in range(10)])


def test_names_from_a_file(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "some", list(range(10)))
    (folder / "classes.txt").write_text("\n".join("abcdefghij"))
    assert open_source(folder).class_names == list("abcdefghij")
    (folder / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="classes.txt: expected 10 names, one per class, got 2"):
        open_source(folder)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian package dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_is_known_wherever_it_lies(tmp_path: Path, split: str) -> None:
    (tmp_path / "digits").symlink_to(FASHION)
    assert open_source(tmp_path / "digits", split).class_names == list(FASHION_MNIST_CLASSES)


def test_an_idx_file_is_read_as_far_as_its_header_says(tmp_path: Path) -> None:
    import gzip
    import tracemalloc

    folder = write_idx(tmp_path / "x", [0, 1])
    path = folder / "train-images-idx3-ubyte"
    data = path.read_bytes()
    path.unlink()
    path = folder / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(data + bytes(200 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="-ubyte.gz: expected 32 bytes of data for shape .* got more"):
        open_source(folder)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">IIII", 0x803, 2**32 - 1, 2**31, 2**31))
    with pytest.raises(ValueError, match="-ubyte.gz: expected .* bytes of data .* got at most"):
        open_source(folder)


# ---- sources of one's own ----


class Own:
    name, class_names, labels = "own", ["a", "b"], np.array([0, 1, 1])

    def __len__(self) -> int:
        return 3

    def image(self, index: int) -> np.ndarray:
        return np.full((9, 8, 3), index, np.uint8)


def test_a_source_of_ones_own() -> None:
    check_source(Own())
    assert source_fingerprint(Own()) == source_fingerprint(Own())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": None}, TypeError, "source.name: expected text, got None"),
        ({"class_names": "ab"}, TypeError, "source.class_names: expected a list of names"),
        ({"labels": [0, 1]}, ValueError, r"source.labels: expected \(3,\) integers"),
        ({"labels": [0.0, 1.0, 1.0]}, ValueError, r"source.labels: expected \(3,\) integers"),
        ({"labels": [0, 1, 2]}, ValueError, "source.labels: expected 0 to 1, got 0 to 2"),
        ({"image": lambda i: np.zeros((4, 4), np.uint8)}, ValueError, r"source.image\(0\): expected shape \(H, W, 3\)"),
        (
            {"image": lambda i: np.zeros((4, 4, 3))},
            TypeError,
            r"source.image\(0\): expected a uint8 array, got float64",
        ),
    ],
)
def test_what_a_source_lacks_is_said_by_name(changes: dict, error: type, message: str) -> None:
    source = Own()
    for name, value in changes.items():
        setattr(source, name, value)
    with pytest.raises(error, match=message):
        check_source(source)


def test_a_source_without_a_name(tmp_path: Path) -> None:
    class Nameless:
        class_names, labels = ["a"], np.array([0])

    with pytest.raises(TypeError, match="expected an ImageSource .* got a Nameless without 'name'"):
        check_source(Nameless())


def test_reading_ahead_keeps_order_and_raises_what_was_raised() -> None:
    batches = [range(0, 3), range(3, 4), range(4, 9)]
    for workers, ahead in ((1, 0), (3, 1), (4, 5)):
        found = list(read_ahead(batches, lambda i: i * i, workers, ahead))
        assert found == [[i * i for i in batch] for batch in batches]
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(batches, lambda i: 1 // (i - 3), 2))


def test_what_lies_beside_the_splits_is_said(tmp_path: Path, put) -> None:
    put("train", "a", "x.png")
    put("val", "a", "x.png")
    put("overview.png")
    (tmp_path / "LICENSE").write_text("x")
    (tmp_path / "meta").mkdir()
    put("train", "loose.png")
    assert open_source(tmp_path).summary == (
        f"{tmp_path.name}/train: 1 picture in 1 class; left out: 1 folder that is no split (such as 'meta'), "
        "1 file of another kind (such as 'LICENSE'), 2 pictures beside the class folders (such as 'overview.png')"
    )


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path, put) -> None:
    put("\x1b]0;x\x07", "cat", "\x1b[2Jx.png")
    (tmp_path / "\x1b]0;x\x07" / "cat" / "\x1b[2J.txt").write_text("x")
    assert open_source(tmp_path / "\x1b]0;x\x07").summary.isprintable()
