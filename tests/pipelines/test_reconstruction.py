"""Photographs through the tokenizer and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from alitok_fast.pipelines.reconstruction import reconstruct, reconstruct_files, side_by_side
from alitok_fast.storage.images import to_uint8


def test_reconstruction_is_decode_of_encode(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    result = reconstruct(tokenizer, photo)
    assert np.array_equal(result.original, photo)
    images = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    assert torch.equal(result.tokens, tokenizer.encode(images))
    assert np.array_equal(result.image, to_uint8(tokenizer.decode(result.tokens))[0])
    assert 0 < result.psnr < 40


def test_tiles_keep_their_places(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    photo = np.random.default_rng(0).integers(0, 256, (16 * 2 + 3, 16 * 3 + 5, 3), dtype=np.uint8)
    result = reconstruct(tokenizer, photo, tile=True, batch_size=4)
    assert result.original.shape == result.image.shape == (32, 48, 3)
    assert result.tokens.shape == (6, tokenizer.config.num_tokens)
    assert np.array_equal(result.original, photo[1:33, 2:50])
    tile = reconstruct(tokenizer, result.original[16:, 32:])
    assert np.array_equal(result.image[16:, 32:], tile.image)


def test_too_small_to_tile(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"photo: expected at least 16 pixels a side to tile, got \(20, 15\)"):
        reconstruct(tiny_tokenizer(), np.zeros((15, 20, 3), np.uint8), tile=True)


def test_unreadable_files_are_named_or_skipped(tiny_tokenizer, tmp_path, caplog):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(good)
    bad.write_bytes(good.read_bytes()[:40])
    with pytest.raises(ValueError, match="bad.png: expected a readable image"):
        reconstruct_files(tiny_tokenizer(), [good, bad])
    results = reconstruct_files(tiny_tokenizer(), [bad, good], on_error="skip")
    assert list(results) == [good]
    assert "bad.png" in caplog.text
    assert side_by_side(results).width > 2 * 16
    with pytest.raises(ValueError, match="photos: expected at least one readable picture, got none in 1 files"):
        reconstruct_files(tiny_tokenizer(), [bad], on_error="skip")
