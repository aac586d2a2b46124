"""Dropout by counter: the mask is a function of a seed and of an element's position alone (csrc/dropout.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast.ops.arguments import integer
from alitok_fast.ops.philox import DOMAIN_DROPOUT, philox4x32


def seed_tensor(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed as one int64 element on the device; None takes it from torch's default generator.

    Raises:
        TypeError, ValueError: for what is no integer in the range of int64.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed
    # A fill is a kernel argument: unlike torch.tensor it copies nothing from the host.
    return torch.full((1,), integer("seed", seed), dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, heads: int, rows: int, columns: int, dropout: float) -> tuple[Tensor, float]:
    """(heads, rows, columns) bool mask of what is kept, and the exact probability of keeping an element.

    Element (h, i, j) is dropped when its 16 random bits are below round(dropout * 2**16). The bits are part
    p = j % 128 // 16 of Philox4x32-10 under key (seed low, seed high) and counter
    (DOMAIN_DROPOUT + j // 128 * 16 + j % 16, i, h, 0): half p % 2 (0 is the low one) of word p // 2.
    So sixteen neighbouring counters give 128 neighbouring columns, in vector registers and without a transpose.

    Args:
        seed: int64, one element.
        heads, rows, columns: sizes of the mask, >= 0.
        dropout: probability in [0, 1), rounded to a multiple of 2**-16.
    """
    device = seed.device
    blocks = -(-columns // 128)
    column = DOMAIN_DROPOUT + torch.arange(blocks * 16, device=device)
    row = torch.arange(rows, device=device)[:, None]
    head = torch.arange(heads, device=device)[:, None, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = torch.stack(philox4x32(seed.reshape(()), column, row, head, zero), -1)  # (heads, rows, 16 blocks, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).reshape(heads, rows, blocks, 16, 8)
    bits = halves.transpose(-1, -2).reshape(heads, rows, blocks * 128)[..., :columns]
    threshold = round(dropout * 65536)
    return bits >= threshold, 1 - threshold / 65536
