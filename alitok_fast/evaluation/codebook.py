"""How well a codebook is used."""

from __future__ import annotations

import torch
from torch import Tensor


def codebook_usage(counts: Tensor) -> float:
    """Share of codes chosen at least once, 0 to 1; counts (K,) non-negative."""
    return float((counts > 0).double().mean())


def codebook_perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' frequencies: K when all are equally used, 1 when one is; counts (K,)."""
    total = counts.sum()
    if total == 0:
        raise ValueError("counts: expected at least one code chosen, got none")
    p = counts.double() / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))
