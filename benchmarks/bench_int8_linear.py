"""int8_linear at the shapes of the tokenizer's decoder, beside torch's products in bfloat16 and float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alitok_fast.config import tokenizer_preset
from alitok_fast.ops.int8_linear import int8_linear, int8_linear_reference, pack_int8
from alitok_fast.testing import relative_error

CONFIG = tokenizer_preset("256")
WIDTH = CONFIG.decoder_width
SHAPES = {"in_proj": (WIDTH, 3 * WIDTH), "c_fc": (WIDTH, 4 * WIDTH), "c_proj": (4 * WIDTH, WIDTH)}


@pytest.mark.quick("8-c_proj")
@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("images", [1, 8])
def bench_int8_linear(images, layer, mode, device, compare):
    """Rounding the activations is part of it; the weights were packed before."""
    if device.type != "cpu":
        pytest.skip("int8_linear is for the CPU")
    inputs, outputs = SHAPES[layer]
    rows = images * (CONFIG.num_tokens + CONFIG.num_start_tokens)
    rows = mode.pick(check=13, quick=rows, full=rows)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    packed = pack_int8(weight)
    expected = int8_linear_reference(x, packed, bias, outputs, torch.float64)
    assert relative_error(int8_linear(x, packed, bias, outputs), expected) < 1e-5
    low = [t.bfloat16() for t in (x, weight, bias)]
    compare(
        lambda: int8_linear(x, packed, bias, outputs, torch.bfloat16),
        {"bfloat16": lambda: F.linear(*low), "float32": lambda: F.linear(x, weight, bias)},
        2 * rows * inputs * outputs,
        "int8_flops",
    )
