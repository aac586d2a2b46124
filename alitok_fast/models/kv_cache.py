"""Keys and values of the positions seen so far: static, preallocated, passed explicitly."""

from __future__ import annotations

import torch

from alitok_fast.config import GeneratorConfig


class KVCache:
    """Storage for `rows` sequences: `keys` and `values` are (layers, rows, heads, N, head_dim).

    N positions are enough: the condition and all tokens but the last, which nothing follows. Keys are stored
    normalised and rotated. `position`, () int64 on the device, is the next one to be filled: a tensor, so that a
    captured CUDA graph moves it on by itself. `arrivals` are the counters that `cached_attention` asks for.
    """

    def __init__(self, config: GeneratorConfig, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_layers, rows, config.num_heads, config.num_tokens, config.head_dim)
        with torch.inference_mode(False):  # else they could be written in such a mode only
            self.keys = torch.zeros(shape, device=device, dtype=dtype)
            self.values = torch.zeros(shape, device=device, dtype=dtype)
            self.arrivals = torch.zeros(rows * config.num_heads, device=device, dtype=torch.int32)
            self.position = torch.zeros((), device=device, dtype=torch.int64)

    @staticmethod
    def bytes_per_row(config: GeneratorConfig, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * config.width * config.num_tokens * dtype.itemsize

    @property
    def rows(self) -> int:
        return self.keys.shape[1]
