"""Norm, gate and product of a generator's MLP at the rows of a sampling step, beside the separate operators."""

from __future__ import annotations

import pytest
import torch

from alitok_fast.config import GENERATORS
from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.fused_linear import LinearWeights, fused_linear_reference, norm_linear, whole_linear
from alitok_fast.ops.swiglu import swiglu
from alitok_fast.testing import relative_error

CONFIG = GENERATORS["b"]


@pytest.mark.quick("2")
@pytest.mark.parametrize("rows", [2, 16, 32])
def bench_fused_linear(rows, mode, device, compare):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, CONFIG.width, generator=generator).to(device)
    norm = torch.ones(CONFIG.width, device=device, dtype=torch.bfloat16)
    gate, up = (
        LinearWeights((torch.randn(CONFIG.hidden, CONFIG.width, generator=generator) / 30).to(device, torch.bfloat16))
        for _ in range(2)
    )
    wide = [LinearWeights(layer.weight.double()) for layer in (up, gate)]
    exact = fused_linear_reference(x.double(), norm.double(), 1e-5, *wide)
    assert relative_error(norm_linear(x, None, norm, 1e-5, up, gate)[1], exact) <= 0.02

    def apart():
        normed = add_rms_norm(x, None, norm, 1e-5)[1]
        return swiglu(whole_linear(normed, gate), whole_linear(normed, up))

    read = gate.weight.nbytes + up.weight.nbytes
    compare(lambda: norm_linear(x, None, norm, 1e-5, up, gate), {"separate operators": apart}, read, "read_bytes")
