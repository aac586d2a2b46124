"""One pass of features gives every measure, each the one that its own function gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from alitok_fast.evaluation.comparison import compare, doubts
from alitok_fast.evaluation.feature_folder import FeatureFolder
from alitok_fast.evaluation.measures import frechet_distance, inception_score, kernel_distance, precision_recall
from alitok_fast.evaluation.moments import Moments
from alitok_fast.evaluation.reference import Reference

COUNT = 40
WIDTHS = {"pooled": 6, "spatial": 4, "logits": 5}


def drawn(name: str, count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTHS[name], generator=torch.Generator().manual_seed(seed))


def folder(path: Path, names: Mapping[str, int] = WIDTHS, **facts) -> FeatureFolder:
    """Images whose first pixel is their number; their features are drawn."""
    table = {name: drawn(name, COUNT, seed) for seed, name in enumerate(names)}

    def images(begin: int, end: int) -> Iterator[np.ndarray]:
        yield np.arange(begin, end, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)

    made = FeatureFolder(path, COUNT, facts, chunk=16)
    made.compute(images, lambda pixels: {name: values[pixels[:, 0, 0, 0].long()] for name, values in table.items()})
    return made


def reference(vectors: int | None = 30, names=("pooled", "spatial"), kind: str = "ADM", **facts) -> Reference:
    moments = {name: Moments.of(drawn(name, 60, 10)) for name in names}
    return Reference(moments, facts, kind, vectors=None if vectors is None else drawn("pooled", vectors, 11))


def test_every_measure_is_its_functions(tmp_path: Path) -> None:
    features, real = folder(tmp_path), reference()
    got = compare(features, real)
    pooled = features.vectors("pooled")
    assert got["fid"] == pytest.approx(frechet_distance(Moments.of(pooled), real.moments["pooled"]), rel=1e-12)
    spatial = Moments.of(features.vectors("spatial"))
    assert got["sfid"] == pytest.approx(frechet_distance(spatial, real.moments["spatial"]), rel=1e-12)
    assert (got["kid"], got["kid_std"]) == kernel_distance(pooled, real.vectors, subset_size=30)
    assert (got["precision"], got["recall"]) == precision_recall(pooled, real.vectors)
    assert (got["inception_score"], got["inception_score_std"]) == inception_score(features.vectors("logits"))
    assert len(got) == 8 and len({round(value, 9) for value in got.values()}) > 6


def test_only_what_there_is_something_for(tmp_path: Path) -> None:
    features = folder(tmp_path / "pooled", {"pooled": 0})
    assert list(compare(features, reference(None))) == ["fid"]
    assert list(compare(features, reference(None), drawn("pooled", 20, 3))) == [
        "fid",
        "kid",
        "kid_std",
        "precision",
        "recall",
    ]
    both = folder(tmp_path / "both", {"pooled": 0, "spatial": 1})
    assert list(compare(both, reference(None, ["pooled"]))) == ["fid"]
    with pytest.raises(ValueError, match="reference: expected moments of 'pooled', got those of spatial"):
        compare(features, reference(names=["spatial"]))


def test_distances_in_other_features_are_not_called_fid(tmp_path: Path) -> None:
    got = compare(folder(tmp_path), reference(), inception=False)
    assert "frechet_distance" in got and "kernel_distance" in got and "class_score" in got
    assert not {"fid", "sfid", "kid", "inception_score"} & got.keys()


def test_what_hinders_a_comparison_is_said(tmp_path: Path) -> None:
    features = folder(tmp_path, network="inception", size=256, crop="none", weights_file="abcdefabcd")
    said = doubts(features, reference(kind="alitok_fast", network="inception", size=64, crop="ADM"))
    assert [line.split(":")[0] for line in said] == [
        "the images are 40, published numbers are of 50,000",
        "the reference has 60 images",
        "Inception's weights are of a file whose SHA-256 begins with abcdefab, "
        "published numbers are of those of 6726825d",
        "crop",
        "size",
    ]
    assert said[-1] == "size: the images have 256, the reference has 64"
    whole = FeatureFolder(tmp_path / "whole", 50_000, {"size": 256})
    assert doubts(whole, Reference({"pooled": Moments(None, torch.zeros(1), torch.zeros(1, 1))}, {}, "ADM")) == []
