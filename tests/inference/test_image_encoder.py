"""Images to tokens in each precision: the tokenizer's own, or near it, and right after its weights have changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from alitok_fast import load_tokenizer
from alitok_fast.data import cache_crops, to_tensor, validate_token_cache
from alitok_fast.inference.image_encoder import ImageEncoder
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.training.tokenize import tokenize


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer("demo", dtype=torch.float32)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return to_tensor(np.concatenate([cache_crops(getattr(data, name)(), 32) for name in ("astronaut", "coffee")]))


def test_float32_is_the_tokenizers(demo: Tokenizer, images: torch.Tensor) -> None:
    for dtype in (None, torch.float32):
        assert torch.equal(ImageEncoder(demo, dtype)(images), demo.encode(images))


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.03), (torch.int8, 0.06)])
def test_reduced_precisions_change_few_tokens(demo, images, dtype: torch.dtype, share: float) -> None:
    expected, tokens = demo.encode(images), ImageEncoder(demo, dtype)(images)
    assert 0 < (tokens != expected).float().mean() < share
    # What changed lies between two codes: the features are nearly as close to the other one.
    z = demo.features(images)
    near, other = ((z - demo.quantize.embedding(t)).square().sum(-1) for t in (expected, tokens))
    changed = tokens != expected
    assert (other[changed] / near[changed]).median() < 1.2


def test_a_copy_follows_the_weights(images: torch.Tensor) -> None:
    tokenizer = load_tokenizer("demo", dtype=torch.float32)
    encoder = ImageEncoder(tokenizer, torch.bfloat16)
    before = encoder(images)
    with torch.no_grad():
        tokenizer.encoder.conv_out.bias.add_(1.0)
    assert not torch.equal(before, encoder(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_other_precisions_are_refused(demo: Tokenizer, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="encode_dtype: expected float32, bfloat16, float16, int8 on cpu, got float"):
        ImageEncoder(demo, dtype)


def test_bad_images_are_named(demo: Tokenizer, images: torch.Tensor) -> None:
    encoder = ImageEncoder(demo, torch.bfloat16)
    with pytest.raises(ValueError, match="images: expected"):
        encoder(images[:, :, :16])
    with pytest.raises(ValueError, match="images: expected"):
        encoder(images + 1)


class Pictures:
    name, class_names, labels = "pictures", ["a"], np.zeros(3, np.int64)

    def __len__(self) -> int:
        return 3

    def image(self, index: int) -> np.ndarray:
        return getattr(data, ("astronaut", "coffee", "chelsea")[index])()


def test_a_cache_is_of_one_precision(demo: Tokenizer, tmp_path: Path) -> None:
    for name, dtype in (("plain", None), ("bf16", torch.bfloat16)):
        tokenize(demo, Pictures(), tmp_path / name, 2, progress=False, dtype=dtype)
    plain, bf16 = (validate_token_cache(tmp_path / name) for name in ("plain", "bf16"))
    assert plain.meta.data != bf16.meta.data and bf16.meta.data.endswith("-bfloat16")
    assert plain.meta.tokenizer == bf16.meta.tokenizer
    assert 0 < np.mean(plain.tokens != bf16.tokens) < 0.05
    with pytest.raises(ValueError, match="data"):
        tokenize(demo, Pictures(), tmp_path / "plain", 2, progress=False, dtype=torch.bfloat16)
