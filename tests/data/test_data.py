"""Image sources, crops, data order and the token cache."""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alitok_fast.data import (
    DataOrder,
    FolderImages,
    IdxImages,
    UnreadableImageError,
    cache_crops,
    encoded,
    open_source,
    read_image,
    to_tensor,
    train_crop,
    validate_token_cache,
    write_token_cache,
)
from alitok_fast.data.pictures import PixelGate
from alitok_fast.data.reading import read_ahead
from alitok_fast.data.token_cache import TokenCacheMeta

FASHION = Path("/usr/share/datasets/fashion-mnist")


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, split: str = "train", suffix: str = "") -> None:
    opener = gzip.open if suffix else open
    with opener(folder / f"{split}-images-idx3-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    with opener(folder / f"{split}-labels-idx1-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">II", 0x801, len(labels)) + labels.tobytes())


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    write_idx(tmp_path, rng.integers(0, 256, (5, 28, 28), np.uint8), np.array([0, 1, 2, 1, 0], np.uint8), suffix=".gz")
    return tmp_path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    for label, name in enumerate(["boot", "apple"]):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 256, (20 + 4 * i, 30 + label, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_is_padded_and_replicated(tmp_path: Path, suffix: str) -> None:
    images = np.random.default_rng(0).integers(1, 256, (3, 28, 27), np.uint8)
    write_idx(tmp_path, images, np.array([2, 0, 1], np.uint8), "t10k", suffix)
    source = open_source(tmp_path, "test", 32)
    picture = source.image(1)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert (picture[2:30, 2:29] == images[1][:, :, None]).all()
    assert picture.sum() == 3 * int(images[1].sum())  # nothing but black around it
    assert source.labels.tolist() == [2, 0, 1] and source.class_names == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-7], "expected 3920 bytes of data .* got 3913"),
        (lambda raw: raw[:9], "IDX header of 16 bytes, got 9"),
        (lambda raw: b"\x00\x00\x08\x01" + raw[4:], "magic number 0x00000803, got 0x00000801"),
        (lambda raw: raw + b"x", "expected 3920 bytes of data .* got more"),
    ],
)
def test_damaged_idx_names_the_file(idx: Path, damage, message: str) -> None:
    path = idx / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(ValueError, match=message) as error:
        IdxImages(idx)
    assert str(path) in str(error.value)


def test_truncated_gzip_and_missing_files(idx: Path) -> None:
    path = idx / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="truncated or damaged"):
        IdxImages(idx)
    with pytest.raises(ValueError, match="expected t10k-images-idx3-ubyte"):
        IdxImages(idx, "test")
    with pytest.raises(ValueError, match="split: expected one of"):
        IdxImages(idx, "validation")


def test_label_count_must_fit(idx: Path) -> None:
    with gzip.open(idx / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">II", 0x801, 4) + bytes(4))
    with pytest.raises(ValueError, match="expected 5 labels, one per image, got 4"):
        IdxImages(idx)


def test_folder_classes_are_sorted(pictures: Path) -> None:
    source = open_source(pictures)
    assert source.class_names == ["apple", "boot"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.image(3).shape == (20, 30, 3)
    flat = FolderImages(pictures / "boot")
    assert flat.class_names == ["boot"] and len(flat) == 3


def test_unreadable_picture_stops_or_is_skipped_by_name(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = pictures / "apple" / "1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    source = FolderImages(pictures, on_error="stop")
    with pytest.raises(UnreadableImageError, match="1.png: expected a readable image"):
        source.image(1)
    skipping = FolderImages(pictures, on_error="skip")
    assert len(skipping) == 5 and bad not in skipping.paths and skipping.labels.tolist() == [0, 0, 1, 1, 1]
    assert str(bad) in caplog.text
    with pytest.raises(ValueError, match="on_error: expected one of 'stop', 'skip', got 'ignore'"):
        FolderImages(pictures, on_error="ignore")


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one readable image"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="expected a folder"):
        open_source(tmp_path / "nowhere")


def test_train_crop_is_a_flipped_window_and_repeats() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    windows = [image[:, left : left + 16] for left in range(25)]
    windows += [window[:, ::-1] for window in windows]
    seen = set()
    for seed in range(200):
        crop = train_crop(image, 16, np.random.default_rng(seed))
        found = [i for i, window in enumerate(windows) if (window == crop).all()]
        assert len(found) == 1
        seen.add(found[0])
        assert (crop == train_crop(image, 16, np.random.default_rng(seed))).all()
    assert len(seen) > 40  # of 50: every offset and both flips occur


def test_ten_crops() -> None:
    image = np.random.default_rng(0).integers(0, 256, (22, 22, 3), np.uint8)
    crops = cache_crops(image, 20, 10)  # 1.1 * 20 = 22: no resize
    for half, whole in ((crops[:5], image), (crops[5:], image[:, ::-1])):
        expected = [whole[:20, :20], whole[:20, 2:], whole[2:, :20], whole[2:, 2:], whole[1:21, 1:21]]
        assert (half == np.stack(expected)).all()
    assert (cache_crops(image, 22, 1) == image[None]).all()
    assert (cache_crops(image, 22, 2)[1] == image[:, ::-1]).all()
    assert cache_crops(image[:, :13], 32, 10).shape == (10, 32, 32, 3)
    with pytest.raises(ValueError, match="crops: expected one of"):
        cache_crops(image, 20, 3)


def test_to_tensor_range() -> None:
    tensor = to_tensor(np.array([[[[0, 128, 255]]]], np.uint8))
    assert tensor.shape == (1, 3, 1, 1) and tensor.dtype == torch.float32
    assert tensor.flatten().tolist() == pytest.approx([0, 128 / 255, 1])


@pytest.mark.parametrize(("size", "batch"), [(7, 3), (1, 4), (10, 10), (5, 12)])
def test_order_covers_every_epoch_once(size: int, batch: int) -> None:
    order = DataOrder(size, batch, seed=3)
    pairs = [pair for step in range(size * 4) for pair in order.at(step)]
    for epoch in range(3):
        assert sorted(sample for e, sample in pairs if e == epoch) == list(range(size))
    assert DataOrder(size, batch, seed=3).at(size * 2) == order.at(size * 2)  # from anywhere, without history


def test_order_depends_on_seed_and_splits_over_ranks() -> None:
    whole = DataOrder(100, 8, seed=0)
    assert whole.at(5) != DataOrder(100, 8, seed=1).at(5)
    parts = [DataOrder(100, 8, seed=0, rank=rank, world=2).at(5) for rank in range(2)]
    assert [pair for both in zip(*parts, strict=True) for pair in both] == whole.at(5)
    draws = {float(whole.rng(epoch, sample).random()) for epoch in range(3) for sample in range(3)}
    assert len(draws) == 9


def encoder(tokens: int, codes: int):
    """A stand-in for Tokenizer.encode: tokens that depend on every pixel."""

    def encode(images: torch.Tensor) -> torch.Tensor:
        sums = (images * 255).round().long().sum((1, 2, 3))
        return (sums[:, None] + torch.arange(tokens)) % codes

    return encode


def cache_meta(source, **changes) -> TokenCacheMeta:
    meta = TokenCacheMeta(len(source), 2, 6, 50, 32, list(source.class_names), source.name, "abc")
    return dataclasses.replace(meta, **changes)


def test_token_cache_round_trip(idx: Path, tmp_path: Path) -> None:
    source = IdxImages(idx)
    write_token_cache(tmp_path / "cache", source, encoder(6, 50), cache_meta(source), batch_size=2)
    cache = validate_token_cache(tmp_path / "cache")
    assert cache.tokens.dtype == np.uint16 and cache.tokens.shape == (5, 2, 6)
    for i in range(5):
        expected = encoder(6, 50)(to_tensor(cache_crops(source.image(i), 32, 2)))
        assert (cache.tokens[i] == expected.numpy()).all()
    assert cache.labels.tolist() == source.labels.tolist()
    assert cache.sample(3, np.random.default_rng(0)).dtype == np.int64


def test_interrupted_cache_continues(idx: Path, tmp_path: Path) -> None:
    source, meta, folder = IdxImages(idx), None, tmp_path / "cache"
    meta = cache_meta(source)
    calls = []

    def failing(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 3:
            raise OSError("No space left on device")
        return encoder(6, 50)(images)

    with pytest.raises(OSError, match="No space"):
        write_token_cache(folder, source, failing, meta, batch_size=1)
    with pytest.raises(ValueError, match="unfinished"):
        validate_token_cache(folder)
    with pytest.raises(ValueError, match="tokenizer: expected 'abc', got 'other'"):
        write_token_cache(folder, source, encoder(6, 50), cache_meta(source, tokenizer="other"))
    write_token_cache(folder, source, encoder(6, 50), meta, batch_size=1)
    write_token_cache(tmp_path / "whole", source, encoder(6, 50), meta)
    assert (validate_token_cache(folder).tokens == validate_token_cache(tmp_path / "whole").tokens).all()


def test_cache_refuses_tokens_out_of_range(idx: Path, tmp_path: Path) -> None:
    source = IdxImages(idx)
    with pytest.raises(ValueError, match=r"encode: expected \(10, 6\) tokens below 50"):
        write_token_cache(tmp_path / "cache", source, encoder(6, 5000), cache_meta(source))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("tokens.npy", lambda p: p.write_bytes(p.read_bytes()[:-8]), "tokens.npy: expected a whole .npy array"),
        ("tokens.npy", lambda p: np.save(p, np.full((5, 2, 6), 50, np.uint16)), "expected tokens below 50, got 50"),
        ("tokens.npy", lambda p: np.save(p, np.zeros((5, 2, 7), np.uint16)), r"got uint16 of shape \(5, 2, 7\)"),
        ("labels.npy", lambda p: np.save(p, np.full(5, 3)), r"expected labels in 0..2, got 3..3"),
        ("labels.npy", lambda p: p.unlink(), "labels.npy: expected a whole .npy array"),
        ("meta.json", lambda p: p.write_text("{"), "expected token cache metadata"),
        ("meta.json", lambda p: p.write_text(json.dumps({"images": 5})), "expected token cache metadata"),
        ("meta.json", lambda p: p.unlink(), "no meta.json"),
    ],
)
def test_damaged_cache_is_explained(idx: Path, tmp_path: Path, file: str, damage, message: str) -> None:
    source = IdxImages(idx)
    write_token_cache(tmp_path / "cache", source, encoder(6, 50), cache_meta(source))
    damage(tmp_path / "cache" / file)
    with pytest.raises(ValueError, match=message):
        validate_token_cache(tmp_path / "cache")


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian package dataset-fashion-mnist is not installed")
def test_fashion_mnist() -> None:
    source = open_source(FASHION, "test")
    assert len(source) == 10_000 and source.class_names[9] == "ankle boot"
    assert np.bincount(source.labels).tolist() == [1000] * 10


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "8", None])
def test_counts_are_checked_by_name(pictures: Path, wrong: object) -> None:
    image, rng = np.zeros((9, 9, 3), np.uint8), np.random.default_rng(0)
    for name, call in (
        ("size", lambda: cache_crops(image, wrong, 1)),
        ("size", lambda: train_crop(image, wrong, rng)),
        ("size", lambda: DataOrder(wrong, 2, 0)),
        ("batch_size", lambda: DataOrder(4, wrong, 0)),
        ("world", lambda: DataOrder(4, 2, 0, 0, wrong)),
        ("limit", lambda: PixelGate(wrong)),
        ("workers", lambda: next(read_ahead([[1]], abs, wrong))),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number of at least 1, got {wrong!r}"):
            call()
    if wrong is not None:
        for call in (
            lambda: open_source(pictures, image_size=wrong),
            lambda: FolderImages(pictures, image_size=wrong),
            lambda: read_image(pictures / "boot" / "0.png", image_size=wrong),
        ):
            with pytest.raises(ValueError, match="image_size: expected a whole number of at least 1"):
                call()
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        DataOrder(4, 2, 0, 2, 2)


def test_every_thread_goes_through_one_gate(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gates = []
    monkeypatch.setattr(encoded, "check_image", lambda picture, name, gate: gates.append(gate))
    source = FolderImages(pictures, on_error="skip")
    monkeypatch.setattr(encoded, "decode_image", lambda picture, name, gate, **_: gates.append(gate))
    source.image(0)
    assert len(gates) == 7 and len(set(gates)) == 1 and isinstance(gates[0], PixelGate)
