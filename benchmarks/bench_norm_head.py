"""The last norm and the head of a generator at the rows of a sampling step, beside the separate operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alitok_fast.config import GENERATORS
from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.norm_head import norm_head, norm_head_reference
from alitok_fast.testing import relative_error

CONFIG = GENERATORS["b"]


@pytest.mark.quick("2")
@pytest.mark.parametrize("rows", [2, 16, 32])
def bench_norm_head(rows, mode, device, compare):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, CONFIG.width, generator=generator).to(device)
    norm, bias = torch.ones(CONFIG.width, device=device), torch.zeros(CONFIG.codebook_size, device=device)
    weight = (torch.randn(CONFIG.codebook_size, CONFIG.width, generator=generator) / 30).to(device)
    exact = norm_head_reference(x.double(), norm.double(), 1e-5, weight.double(), bias.double())
    assert relative_error(norm_head(x, None, norm, 1e-5, weight, bias), exact) <= 1e-5

    def apart():
        return F.linear(add_rms_norm(x, None, norm, 1e-5)[1], weight, bias)

    compare(
        lambda: norm_head(x, None, norm, 1e-5, weight, bias), {"norm and product": apart}, weight.nbytes, "read_bytes"
    )
