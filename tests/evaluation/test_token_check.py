"""The checker of token caches: what it counts, and the mistakes that it must see."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from alitok_fast.data.token_cache import TokenCache, TokenCacheMeta
from alitok_fast.evaluation import token_check
from alitok_fast.evaluation.token_check import check_tokens


@pytest.fixture
def cache() -> TokenCache:
    meta = TokenCacheMeta(40, 4, 5, 16, 8, ["a", "b\x1b", "c"], "noise", "abc")
    tokens = np.random.default_rng(0).integers(0, 16, meta.shape).astype(np.uint16)
    return TokenCache(tokens, np.arange(40) % 3, meta)


def test_nothing_is_said_of_a_good_cache(cache: TokenCache, monkeypatch: pytest.MonkeyPatch) -> None:
    report = check_tokens(cache)
    assert report.warnings == [] and len(report.repeated) == 0 and report.usage == 1
    assert (report.code_counts == np.bincount(cache.tokens.reshape(-1), minlength=16)).all()
    assert (report.class_counts == [14, 13, 13]).all() and 14 < report.perplexity <= 16
    assert report.summary[1] == "classes: 3 of 3 with images, 13 to 14 in each"
    monkeypatch.setattr(token_check, "_PIECE", 7)
    assert check_tokens(cache).summary == report.summary


def test_repeated_images_and_their_labels(cache: TokenCache) -> None:
    for later, earlier in ((30, 3), (39, 3), (20, 10)):
        cache.tokens[later] = cache.tokens[earlier]
    report = check_tokens(cache)
    assert report.repeated.tolist() == [[20, 10], [30, 3], [39, 3]]
    assert report.warnings == [
        "images: 3 have the tokens of an earlier one, such as 20 those of 10",
        "images: 1 of them have another label than the earlier one, such as 20 (2) and 10 (1)",
    ]


def test_equal_hashes_are_not_believed(cache: TokenCache) -> None:
    found = token_check._repeated(cache.tokens, np.zeros(40, np.uint64))
    assert found.shape == (0, 2)


def test_mirror_images_that_were_not_mirrored(cache: TokenCache) -> None:
    cache.tokens[:30, 2] = cache.tokens[:30, 0]
    cache.tokens[:10, 3] = cache.tokens[:10, 1]  # a quarter: symmetric pictures
    assert check_tokens(cache).warnings == ["crops: number 2 is number 0 again in 75.0% of the images"]


def test_collapse_constant_crops_and_classes_without_images(cache: TokenCache) -> None:
    meta = dataclasses.replace(cache.meta, codebook_size=400, class_names=["a", "b", "c", "\x1b[2J", "e", "f", "g"])
    cache.tokens[5, 1] = 3
    lines = check_tokens(dataclasses.replace(cache, meta=meta)).warnings
    assert lines == [
        "codes: expected a perplexity of at least 20.0, the codebook has collapsed",
        "classes: 4 have no image: 3 (\\x1b[2J), 4 (e), 5 (f), ...",
        "crops: 1 are one code over and over",
    ]
