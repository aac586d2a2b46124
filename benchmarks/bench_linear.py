"""linear at the generator's shapes, forward and backward, beside torch's products in bfloat16 with autocast's casts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alitok_fast.config import GENERATORS
from alitok_fast.ops.linear import linear, linear_reference
from alitok_fast.testing import relative_error

CONFIG = GENERATORS["b"]
SHAPES = {
    "qkv": (CONFIG.width, 3 * CONFIG.width),
    "w1": (CONFIG.width, CONFIG.hidden),
    "w2": (CONFIG.hidden, CONFIG.width),
}


@pytest.mark.quick("qkv-forward-backward")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("layer", SHAPES)
def bench_linear(layer, backward, mode, device, compare):
    """Eight sequences of the generator."""
    if device.type != "cpu":
        pytest.skip("linear is for the CPU")
    inputs, outputs = SHAPES[layer]
    rows = mode.pick(check=40, quick=1, full=8) * (1 if not mode.timed else 1 + CONFIG.num_tokens)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).bfloat16().requires_grad_(backward)
    weight = torch.randn(outputs, inputs, generator=generator).requires_grad_(backward)
    direction = torch.randn(rows, outputs, generator=generator).bfloat16()
    exact = linear_reference(x.detach().double(), weight.detach().bfloat16().double(), None)
    assert relative_error(linear(x, weight).detach(), exact) < 1e-2

    def torchs():
        return F.linear(x, weight.bfloat16())

    def with_gradients(function):
        return lambda: torch.autograd.grad(function(), (x, weight), direction)

    functions = {"own": lambda: linear(x, weight), "torch, bfloat16": torchs}
    if backward:
        functions = {name: with_gradients(function) for name, function in functions.items()}
        for got, wanted in zip(functions["own"](), functions["torch, bfloat16"](), strict=True):
            assert relative_error(got.float(), wanted.float()) < 2e-2
    own = functions.pop("own")
    compare(own, functions, 2 * rows * inputs * outputs * (3 if backward else 1), "bf16_flops")
