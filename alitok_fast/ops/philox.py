"""Philox4x32-10, the counter-based generator behind all noise of the package, in PyTorch.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The kernels have the same in
`csrc/philox.h`; a word is a function of key and counter alone, so every device and every split of the work sees it.
"""

from __future__ import annotations

from torch import Tensor

# Each user of the generator owns one value of the top two bits of counter word 0, so that under one seed no two
# users ever meet the same counter. The other 30 bits are the user's.
DOMAIN_SAMPLE = 0 << 30
DOMAIN_DROPOUT = 1 << 30

_LOW = 0xFFFFFFFF


def split64(value: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of an int64 tensor, each in [0, 2**32), as int64."""
    return value & _LOW, (value >> 32) & _LOW


def philox4x32(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    Args:
        seed: int64, its 64 bits are the key.
        c0, c1, c2, c3: int64 in [0, 2**32), the words of the counter; all five broadcast.

    Returns:
        Four int64 tensors in [0, 2**32).
    """
    k0, k1 = split64(seed)
    for _ in range(10):
        # A product of two words fills 64 bits: int64 wraps, which keeps every bit, and `split64` ignores the sign.
        low0, high0 = split64(0xD2511F53 * c0)
        low1, high1 = split64(0xCD9E8D57 * c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3
