"""swiglu at the shapes of a sampling step and of a training batch, beside torch's two operators, eager and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alitok_fast.config import GENERATORS
from alitok_fast.ops import swiglu
from alitok_fast.ops.swiglu import swiglu_reference
from alitok_fast.testing import relative_error

CONFIG = GENERATORS["b"]


@pytest.mark.quick("16-bf16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [2, 16, 2048])
def bench_swiglu(rows, dtype, mode, device, compare):
    rows = mode.pick(check=min(rows, 16), quick=rows, full=rows)
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(rows, CONFIG.hidden, generator=generator).to(device, dtype) for _ in range(2))
    exact = swiglu_reference(gate.double(), up.double())
    assert relative_error(swiglu(gate, up), exact) <= 2 * torch.finfo(dtype).eps

    def chain(gate, up):
        return F.silu(gate) * up

    functions = {"silu, multiply": lambda: chain(gate, up)}
    if mode.timed and not mode.quick:  # compiling takes longer than all the rest
        compiled = torch.compile(chain)
        functions["compiled"] = lambda: compiled(gate, up)
    compare(lambda: swiglu(gate, up), functions, 2 * gate.nbytes, "read_bytes")
