"""What generated images are compared with: moments of real images' features, from the field's files or from ours."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from alitok_fast.evaluation.moments import Moments
from alitok_fast.storage.files import file_sha256, write_atomically
from alitok_fast.storage.image_arrays import ImageArray
from alitok_fast.storage.tensor_files import read_metadata, read_tensors
from alitok_fast.storage.text import first_line, shown

FORMAT = "alitok_fast reference 1"
INCEPTION = "inception"  # the network of others' files
SUFFIXES = (".npz", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Reference:
    """Moments of features by name ("pooled", "spatial"), and where they are from.

    Args:
        moments: their `count` is None where the file does not say how many images there were.
        facts: what could change the numbers, as it was written: crop, size, network, images. Of files of others, their
            network, and the size of the images that they hold.
        kind: "ADM", "torch-fidelity" or "alitok_fast".
        sha256: of the file; empty before there is one.
        vectors: pooled features (n, d) of some of the images, for precision and recall, or None.
        images: an ADM file that holds images, from which such features can be computed, or None.
    """

    moments: Mapping[str, Moments]
    facts: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "alitok_fast"
    sha256: str = ""
    vectors: Tensor | None = None
    images: Path | None = None


def read_reference(path: Path, argument: str = "reference") -> Reference:
    """The statistics in a file: ADM's `.npz`, torch-fidelity's `.pt`, or ours, `.safetensors`.

    Raises ValueError naming `argument` for a file with other things in it, OSError for one that cannot be read.
    """
    readers = {".npz": _adm, ".pt": _torch_fidelity, ".pth": _torch_fidelity, ".safetensors": _ours}
    if path.suffix not in readers:
        raise ValueError(f"{argument}: expected a file ending in one of {', '.join(SUFFIXES)}, got {path.name}")
    try:
        return readers[path.suffix](path, file_sha256(path))
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def write_reference(path: Path, reference: Reference) -> None:
    """Write ours, replacing a file that is there. Raises ValueError for another suffix than .safetensors."""
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a file ending in .safetensors, got {path.name}")
    tensors = {} if reference.vectors is None else {"vectors": reference.vectors.contiguous()}
    for name, moments in reference.moments.items():
        tensors |= {f"{name}.mean": moments.mean, f"{name}.covariance": moments.covariance}
    counts = {name: moments.count for name, moments in reference.moments.items()}
    about = json.dumps({"counts": counts, "facts": dict(reference.facts)})
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"format": FORMAT, "about": about}))


def _adm(path: Path, sha256: str) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as file:
            there = [name for name in ("mu", "sigma", "mu_s", "sigma_s") if name in file.files]
            arrays = {name: file[name] for name in there}
            has_images = "arr_0" in file.files
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"expected an npz file, got {path} ({shown(first_line(error))})") from None
    if not {"mu", "sigma"} <= arrays.keys():
        hint = "; it holds images: compute their statistics first" if has_images else ""
        raise ValueError(f"expected mu and sigma, got {path} without them{hint}")
    moments = {"pooled": _moments(arrays["mu"], arrays["sigma"], "mu", path)}
    if {"mu_s", "sigma_s"} <= arrays.keys():
        moments["spatial"] = _moments(arrays["mu_s"], arrays["sigma_s"], "mu_s", path)
    facts: dict[str, Any] = {"network": INCEPTION}
    if has_images:
        images = ImageArray.open(path, "arr_0")
        facts["size"] = images.size
    return Reference(moments, facts, "ADM", sha256, images=path if has_images else None)


def _torch_fidelity(path: Path, sha256: str) -> Reference:
    """Its cache holds numpy's arrays in a pickle: what makes them is allowed (by numpy 1's name too), nothing else."""
    make: Any = np.empty(0).__reduce__()[0]
    made = [(make, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")]
    dtypes = [type(np.dtype(dtype)) for dtype in (np.float64, np.float32)]
    with torch.serialization.safe_globals([*made, np.ndarray, np.dtype, *dtypes]):
        state = read_tensors(path, check=bool)
    if not isinstance(state, dict) or not all(isinstance(state.get(name), np.ndarray) for name in ("mu", "sigma")):
        raise ValueError(f"expected torch-fidelity's mu and sigma, got {path} with other things in it")
    moments = {"pooled": _moments(state["mu"], state["sigma"], "mu", path)}
    return Reference(moments, {"network": INCEPTION}, "torch-fidelity", sha256)


def _ours(path: Path, sha256: str) -> Reference:
    metadata = read_metadata(path) or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"expected statistics of this library ({FORMAT!r}), got {path} of another format")
    tensors = read_tensors(path, check=bool)
    about = json.loads(metadata["about"])
    moments = {
        name: _moments(tensors[f"{name}.mean"].numpy(), tensors[f"{name}.covariance"].numpy(), name, path, count)
        for name, count in about["counts"].items()
    }
    return Reference(moments, about["facts"], "alitok_fast", sha256, tensors.get("vectors"))


def _moments(mean: np.ndarray, covariance: np.ndarray, name: str, path: Path, count: int | None = None) -> Moments:
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(f"{name}: expected (d,) and (d, d), got {mean.shape} and {covariance.shape} in {path}")
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(f"{name}: expected floating point, got {mean.dtype} and {covariance.dtype} in {path}")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in {path}")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max(initial=0)):
        raise ValueError(f"{name}: expected a symmetric covariance, got another matrix in {path}")
    return Moments(count, torch.from_numpy(mean), torch.from_numpy(covariance))
