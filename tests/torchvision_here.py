"""torchvision and the libraries on top of it, imported where torchvision's own operators do not load.

They do not beside a build of torch that torchvision was not compiled for, such as the CPU build of the newest release:
`import torchvision` then fails over the schemas of two operators, which its models do not use. Only tests define these;
a user's torchvision belongs to their torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

_defined: list[torch.library.Library] = []  # operators last as long as the library that defines them


def import_or_skip(name: str) -> ModuleType:
    """The module `name`, which may import torchvision; the test is skipped where it is not installed."""
    _torchvision()
    return pytest.importorskip(name)


def smooth_pictures(count: int, size: int = 96) -> torch.Tensor:
    """(count, 3, size, size) uint8: for networks that look at more than single pixels."""
    rng = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, 6, 6, generator=rng)
    return (255 * torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)).to(torch.uint8)


def _torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except ImportError as error:
        pytest.skip(f"no torchvision: {error}")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _defined.append(library)
        importlib.import_module("torchvision")
