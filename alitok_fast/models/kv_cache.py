"""Keys and values of the positions seen so far: static, preallocated, passed explicitly."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast.config import GeneratorConfig


class KVCache:
    """Storage for `slots` sequences: `keys` and `values` are (layers, slots, heads, N, head_dim).

    N positions are enough: the condition and all tokens but the last, which nothing follows. Keys are stored
    normalised and rotated. Where each sequence has got to is known to who feeds it. `arrivals` are the counters that
    `cached_attention` asks for, enough for a window of `columns` positions of each sequence.
    """

    def __init__(
        self, config: GeneratorConfig, slots: int, device: torch.device, dtype: torch.dtype, columns: int = 1
    ) -> None:
        shape = (config.num_layers, slots, config.num_heads, config.num_tokens, config.head_dim)
        self._heads = config.num_heads
        with torch.inference_mode(False):  # else they could be written in such a mode only
            self.keys = torch.zeros(shape, device=device, dtype=dtype)
            self.values = torch.zeros(shape, device=device, dtype=dtype)
            self.arrivals = torch.zeros(slots * columns * config.num_heads, device=device, dtype=torch.int32)

    def arrivals_of(self, inputs: int) -> Tensor | None:
        """Counters for a pass of so many inputs; None where there are not as many, which costs time alone."""
        needed = inputs * self._heads
        return self.arrivals[:needed] if needed <= len(self.arrivals) else None

    @staticmethod
    def bytes_per_slot(config: GeneratorConfig, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * config.width * config.num_tokens * dtype.itemsize

    @property
    def slots(self) -> int:
        return self.keys.shape[1]
