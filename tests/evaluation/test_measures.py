"""Measures of generated images: known values, restatements in float64, and torch-fidelity on the same features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision_here import import_or_skip

from alitok_fast.evaluation import measures
from alitok_fast.evaluation.measures import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    standard_error,
)
from alitok_fast.evaluation.moments import Moments, MomentSums


def some(count: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Like pooled features: not negative, correlated, of unequal sizes."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    mixed = torch.randn(count, width, generator=rng, dtype=torch.float64) @ mixing / width**0.5
    return (mixed + 0.1 * seed).relu().to(dtype)


# ---- moments ----


@pytest.mark.parametrize("pieces", [(50,), (1, 49), (10, 0, 20, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_moments_of_batches_are_those_of_all(pieces: tuple[int, ...], dtype: torch.dtype) -> None:
    values = some(50, 7).to(dtype)
    sums = MomentSums()
    for part in values.split(list(pieces)):
        sums.add(part)
    got, array = sums.moments(), values.double().numpy()
    assert got.count == 50 and got.mean.dtype == got.covariance.dtype == torch.float64
    np.testing.assert_allclose(got.mean, array.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.covariance, np.cov(array, rowvar=False), rtol=1e-10, atol=1e-14)


def test_sums_of_processes_are_put_together() -> None:
    values, whole = some(40, 5), MomentSums()
    for part in (values[:13], values[:0], values[13:]):
        sums = MomentSums()
        sums.add(part)
        whole.merge(sums)
    got, expected = whole.moments(), Moments.of(values)
    assert got.count == 40
    torch.testing.assert_close(got.covariance, expected.covariance, rtol=1e-12, atol=1e-15)


def test_bad_features_are_named() -> None:
    sums = MomentSums()
    with pytest.raises(ValueError, match="features: expected at least 2, got 0"):
        sums.moments()
    with pytest.raises(ValueError, match=r"features: expected shape \(n, d\), got \(3,\)"):
        sums.add(torch.zeros(3))
    with pytest.raises(TypeError, match="features: expected floating point, got torch.int64"):
        sums.add(torch.zeros(3, 2, dtype=torch.int64))
    sums.add(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="features: expected at least 2, got 1"):
        sums.moments()
    with pytest.raises(ValueError, match=r"features: expected shape \(n, 2\), got \(4, 3\)"):
        sums.add(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="features: expected finite numbers, got NaN"):
        sums.add(torch.tensor([[0.0, math.nan]]))
    assert sums.count == 1


# ---- Frechet distance ----


def distance(first: Tensor, second: Tensor) -> float:
    return frechet_distance(Moments.of(first), Moments.of(second))


def test_frechet_distance_of_gaussians() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 4, generator=rng, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0, covariance 1 exactly
    assert distance(x, x) == pytest.approx(0, abs=1e-9)
    assert distance(x, x + 2) == pytest.approx(4 * 2**2)
    assert distance(x, 3 * x) == pytest.approx(4 * (3 - 1) ** 2)
    scale = torch.diag(torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64))[0]
    assert distance(x @ turn, x @ scale @ turn) == pytest.approx(0 + 1 + 4 + 9)
    with pytest.raises(ValueError, match="second: expected 4 features, got 3"):
        distance(x, x[:, :3])


@pytest.mark.parametrize(("n", "m"), [(300, 200), (300, 20), (15, 20)])  # the last ones have singular covariances
def test_frechet_distance_is_that_of_a_root_of_the_product(n: int, m: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = some(n, 32, seed=1), some(m, 32, seed=2)
    (m1, c1), (m2, c2) = ((v.mean(0).numpy(), np.cov(v.numpy(), rowvar=False)) for v in (x, y))
    offset = 1e-10 * np.eye(32)  # the square root of a singular product needs it
    root = linalg.sqrtm((c1 + offset) @ (c2 + offset)).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    assert distance(x, y) == pytest.approx(expected, rel=1e-4 if min(n, m) <= 32 else 1e-8)


def test_frechet_distance_is_torch_fidelitys() -> None:
    metric = import_or_skip("torch_fidelity.metric_fid")
    x, y = some(400, 48, seed=1), some(300, 48, seed=2)
    one, two = (metric.fid_features_to_statistics(v) for v in (x, y))
    expected = metric.fid_statistics_to_metric(one, two, False)["frechet_inception_distance"]
    assert distance(x, y) == pytest.approx(expected, rel=1e-6)


# ---- kernel distance ----


def test_kernel_distance_is_the_definitions() -> None:
    x, y = some(12, 5, seed=1), some(12, 5, seed=2)

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 5 + 1) ** 3

    n = len(x)
    expected = sum(
        kernel(v[i], v[j]) / (n * (n - 1)) for v in (x, y) for i in range(n) for j in range(n) if i != j
    ) - sum(2 * kernel(a, b) / n**2 for a in x for b in y)
    got = kernel_distance(x, y, subsets=3, subset_size=12)
    assert got.mean == pytest.approx(expected, rel=1e-10) and got.std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_torch_fidelitys() -> None:
    metric = import_or_skip("torch_fidelity.metric_kid")
    x, y = some(300, 24, seed=1), some(200, 24, seed=2)
    expected = metric.kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=100, verbose=False)
    got = kernel_distance(x, y, subsets=20, subset_size=100)
    assert got.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert got.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)


def test_kernel_distance_refuses_what_it_cannot_do() -> None:
    x = some(30, 4)
    for size in (1, 21):
        with pytest.raises(ValueError, match=f"subset_size: expected 2 to 20, the size of the smaller set, got {size}"):
            kernel_distance(x, x[:20], subset_size=size)
    with pytest.raises(ValueError, match="subsets: expected at least 1, got 0"):
        kernel_distance(x, x, subsets=0, subset_size=5)
    with pytest.raises(ValueError, match=r"features: expected shapes \(n, d\) and \(m, d\), got \(30, 4\), \(30, 3\)"):
        kernel_distance(x, x[:, :3], subset_size=5)


# ---- Inception Score ----


def test_inception_score_of_known_classes() -> None:
    certain = 1e4 * torch.eye(5).repeat(4, 1)  # each image one class, all classes as often
    assert inception_score(certain, splits=1).mean == pytest.approx(5)
    assert inception_score(torch.zeros(20, 5), splits=2) == pytest.approx((1, 0))
    by_class = certain[certain.argmax(1).argsort()]
    assert inception_score(by_class, splits=5).mean == pytest.approx(1)  # each split has one class
    assert inception_score(by_class, splits=5, seed=0).mean > 1.5
    with pytest.raises(ValueError, match="splits: expected 1 to 20, the number of images, got 21"):
        inception_score(certain, splits=21)
    with pytest.raises(ValueError, match=r"logits: expected shape \(n, classes\), got \(5,\)"):
        inception_score(certain[0])


@pytest.mark.parametrize("count", [100, 97])
@pytest.mark.parametrize("seed", [None, 2020])
def test_inception_score_is_torch_fidelitys(count: int, seed: int | None) -> None:
    metric = import_or_skip("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(count, 11, generator=torch.Generator().manual_seed(0))
    expected = metric.isc_features_to_metric(logits, splits=10, shuffle=seed is not None, rng_seed=2020)
    got = inception_score(logits, seed=seed)
    assert got.mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert got.std == pytest.approx(expected["inception_score_std"], rel=1e-6)


# ---- precision and recall ----


def restated(points: Tensor, manifold: Tensor, k: int) -> float:
    def apart(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] - b[None]).square().sum(-1)

    radii = apart(manifold, manifold).sort(1).values[:, k]
    return float((apart(points, manifold) <= radii).any(1).double().mean())


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("block", [7, 1024])
def test_precision_and_recall_in_blocks(monkeypatch, k: int, block: int) -> None:
    monkeypatch.setattr(measures, "BLOCK", block)
    samples, reference = some(90, 8, seed=1), some(70, 8, seed=2) + 0.3
    got = precision_recall(samples.float(), reference.float(), k)
    exact = samples.float().double(), reference.float().double()
    assert got == pytest.approx((restated(*exact, k), restated(*exact[::-1], k)), abs=1e-9)
    assert 0.1 < got.precision < 1 and 0.1 < got.recall < 1 and got.precision != got.recall


def test_precision_and_recall_of_known_sets() -> None:
    line = torch.arange(10.0)[:, None]
    assert precision_recall(line + 0.5, line) == (1, 1)
    assert precision_recall(line + 100, line) == (0, 0)
    few = torch.arange(10.0)[:, None] / 100  # true to the reference, but all of one kind
    assert precision_recall(few, line) == (1, 0.1)
    far = 1e4 + line  # distances do not drown in the vectors' own size
    assert precision_recall(far + 0.5, far) == (1, 1)
    with pytest.raises(ValueError, match="reference: expected more than k = 3, got 3"):
        precision_recall(line, line[:3])
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        precision_recall(line, line, k=0)


def test_standard_error_of_a_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    assert standard_error(lambda v: float(v.mean()), values, 400) == pytest.approx(1 / 400**0.5, rel=0.2)
