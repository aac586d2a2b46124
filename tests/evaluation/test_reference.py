"""Reference statistics: ADM's files, torch-fidelity's and ours give the same numbers; others are refused by name."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import Touch
from safetensors.torch import save_file

from alitok_fast.evaluation.moments import Moments
from alitok_fast.evaluation.reference import Reference, read_reference, write_reference


def some_moments(width: int, seed: int) -> Moments:
    return Moments.of(torch.randn(30, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


POOLED, SPATIAL = some_moments(6, 0), some_moments(4, 1)


def arrays(**changes) -> dict[str, np.ndarray]:
    found = {
        "mu": POOLED.mean.numpy(),
        "sigma": POOLED.covariance.numpy(),
        "mu_s": SPATIAL.mean.numpy(),
        "sigma_s": SPATIAL.covariance.numpy(),
    }
    return {name: value for name, value in {**found, **changes}.items() if value is not None}


def same(first: Moments, second: Moments) -> bool:
    return torch.equal(first.mean, second.mean) and torch.equal(first.covariance, second.covariance)


@pytest.mark.parametrize("images", [False, True])
def test_the_adm_suites_file(tmp_path: Path, images: bool) -> None:
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(path, **arrays(arr_0=np.zeros((2, 4, 4, 3), np.uint8) if images else None))
    got = read_reference(path)
    assert same(got.moments["pooled"], POOLED) and same(got.moments["spatial"], SPATIAL)
    assert got.kind == "ADM" and got.moments["pooled"].count is None and got.vectors is None
    assert got.images == (path if images else None)
    assert got.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    np.savez(path, **arrays(mu_s=None, sigma_s=None))
    assert list(read_reference(path).moments) == ["pooled"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_torch_fidelitys_cache(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "imagenet-inception-v3-compat-stat-fid-2048.pt"
    torch.save({name: arrays()[name].astype(dtype) for name in ("mu", "sigma")}, path)
    got = read_reference(path)
    torch.testing.assert_close(got.moments["pooled"].mean, POOLED.mean, rtol=1e-6, atol=1e-6)
    assert got.kind == "torch-fidelity" and got.moments["pooled"].mean.dtype == torch.float64


def test_torch_fidelitys_cache_of_numpy_1(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    state = {name: arrays()[name] for name in ("mu", "sigma")}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in data
    path.write_bytes(data)
    assert same(read_reference(path).moments["pooled"], POOLED)


def test_ours_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, facts = tmp_path / "faces.safetensors", {"crop": "ADM", "size": 256, "images": 30}
    written = Reference({"pooled": POOLED, "spatial": SPATIAL}, facts, vectors=torch.rand(5, 6))
    write_reference(path, written)
    got = read_reference(path)
    assert all(same(got.moments[name], moments) for name, moments in written.moments.items())
    assert got.facts == facts and got.moments["pooled"].count == 30 and torch.equal(got.vectors, written.vectors)
    assert got.kind == "alitok_fast" and [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="path: expected a file ending in .safetensors, got faces.npz"):
        write_reference(tmp_path / "faces.npz", written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "expected mu and sigma, got .*bad.npz without them$"),
        ({"mu": None, "arr_0": np.zeros((1, 4, 4, 3), np.uint8)}, "it holds images: compute their statistics first"),
        ({"mu": np.zeros(5)}, r"mu: expected \(d,\) and \(d, d\), got \(5,\) and \(6, 6\)"),
        ({"mu_s": np.zeros(4, np.int64)}, "mu_s: expected floating point, got int64 and float64"),
        ({"mu": np.full(6, np.nan)}, "mu: expected finite numbers, got NaN or infinity"),
        ({"sigma": np.arange(36.0).reshape(6, 6)}, "mu: expected a symmetric covariance"),
        ({"mu": np.array([None] * 6)}, "expected an npz file, got .*Object arrays cannot be loaded"),
    ],
)
def test_bad_statistics_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(ValueError, match=f"--reference: .*{message}"):
        read_reference(path, "--reference")


def test_other_files_are_refused(tmp_path: Path) -> None:
    mark, hostile, foreign = tmp_path / "was here", tmp_path / "hostile.pt", tmp_path / "model.safetensors"
    hostile.write_bytes(pickle.dumps({"mu": Touch(mark)}))
    save_file({"mu": torch.zeros(3)}, foreign)
    torch.save({"mu": torch.zeros(3)}, tmp_path / "tensors.pt")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    for name, message in (
        ("hostile.pt", "reference: .*hostile.pt"),
        ("model.safetensors", "reference: expected statistics of this library .* of another format"),
        ("tensors.pt", "reference: expected torch-fidelity's mu and sigma, got .* with other things in it"),
        ("cut.npz", "reference: expected an npz file, got .*cut.npz"),
        (
            "statistics.json",
            "reference: expected a file ending in one of .npz, .pt, .pth, .safetensors, got statistics",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_reference(tmp_path / name)
    assert not mark.exists()
    with pytest.raises(FileNotFoundError):
        read_reference(tmp_path / "nowhere.npz")
