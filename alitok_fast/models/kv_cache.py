"""Keys and values of the positions seen so far: static, preallocated, passed explicitly."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast.config import GeneratorConfig


class KVCache:
    """Storage for `rows` sequences: `keys` and `values` are (layers, rows, heads, N, head_dim).

    N positions are enough: the condition and all tokens but the last, which nothing follows.
    Keys are stored normalised and rotated. `length` counts the positions filled.
    """

    def __init__(self, config: GeneratorConfig, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.layers, rows, config.heads, config.tokens, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (rows, heads, T, head_dim) of one layer behind `length`; returns all positions so far.

        `length` moves on once every layer has appended, by the caller.
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
