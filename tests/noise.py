"""Five pictures of noise, and an encoder that tells them apart: for tests of token caches."""

from __future__ import annotations

import numpy as np
import torch

from alitok_fast.data.token_cache import TokenCacheMeta


class Source:
    """Five pictures of noise."""

    name, class_names, labels = "noise", ["a", "b"], np.array([0, 1, 0, 1, 1])

    def __len__(self) -> int:
        return 5

    def image(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)


META = TokenCacheMeta(5, 2, 3, 50, 4, ["a", "b"], "noise", "abc", "def")


def encode(images: torch.Tensor) -> torch.Tensor:
    return ((images * 255).round().long().sum((1, 2, 3))[:, None] + torch.arange(3)) % 49 + 1  # never 0
