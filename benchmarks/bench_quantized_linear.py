"""quantized_linear at the shapes of a sampling step, beside torch's product with the weights in the dtype of the
activations, and beside writing the 8-bit weights out each time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alitok_fast.config import GENERATORS
from alitok_fast.ops.quantized_linear import LARGEST, dequantize_weight, quantize_weight, quantized_linear

CONFIG = GENERATORS["b"]
SHAPES = {"qkv": (3 * CONFIG.width, CONFIG.width), "w2": (CONFIG.width, CONFIG.hidden)}


@pytest.mark.quick("2-qkv-int8")
@pytest.mark.parametrize("weight_dtype", list(LARGEST), ids=["int8", "e4m3"])
@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("rows", [2, 16])
def bench_step(rows, layer, weight_dtype, mode, device, compare):
    """All layers' matrices in turn, as a step reads them: no cache holds them all."""
    outputs, inputs = SHAPES[layer]
    count = mode.pick(check=1, quick=CONFIG.num_layers, full=CONFIG.num_layers)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).to(device, torch.bfloat16)
    layers = [torch.randn(outputs, inputs, generator=generator) for _ in range(count)]
    exact = [weight.to(device, torch.bfloat16) for weight in layers]
    packed = [[t.to(device) for t in quantize_weight(weight, weight_dtype)] for weight in layers]
    weight, scale = packed[0]
    expected = x.float() @ dequantize_weight(weight, scale).T
    torch.testing.assert_close(quantized_linear(x, weight, scale).float(), expected, rtol=2**-7, atol=0.05)

    def written_out(weight, scale):
        return F.linear(x, dequantize_weight(weight, scale).to(x.dtype))

    compare(
        lambda: [quantized_linear(x, *pair) for pair in packed],
        {
            "bfloat16 weights": lambda: [F.linear(x, weight) for weight in exact],
            "8-bit weights written out": lambda: [written_out(*pair) for pair in packed],
        },
        sum(weight.nbytes + scale.nbytes for weight, scale in packed),
        "read_bytes",
    )
