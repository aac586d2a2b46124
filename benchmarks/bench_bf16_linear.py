"""bf16_linear at the shapes of the tokenizer's encoder, beside torch's products in bfloat16 and float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alitok_fast.config import tokenizer_preset
from alitok_fast.ops.bf16_linear import bf16_linear, bf16_linear_reference, pack_bf16
from alitok_fast.testing import relative_error

CONFIG = tokenizer_preset("256")
WIDTH = CONFIG.encoder_width
SHAPES = {"in_proj": (WIDTH, 3 * WIDTH), "c_fc": (WIDTH, 4 * WIDTH), "c_proj": (4 * WIDTH, WIDTH)}


@pytest.mark.quick("1-c_fc")
@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("images", [1, 8])
def bench_bf16_linear(images, layer, mode, device, compare):
    """With GELU where the layer has one. The weights were packed before."""
    if device.type != "cpu":
        pytest.skip("bf16_linear is for the CPU")
    inputs, outputs = SHAPES[layer]
    rows = images * (CONFIG.num_tokens + CONFIG.num_image_tokens)
    rows = mode.pick(check=40, quick=rows, full=rows)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    packed, gelu = pack_bf16(weight), layer == "c_fc"
    exact = bf16_linear_reference(x, packed, bias, outputs, torch.float64, gelu=gelu)
    assert relative_error(bf16_linear(x, packed, bias, outputs, gelu=gelu), exact) < 1e-5

    def torchs(dtype):
        arguments = [t.to(dtype) for t in (x, weight, bias)]
        return lambda: F.gelu(F.linear(*arguments)) if gelu else F.linear(*arguments)

    compare(
        lambda: bf16_linear(x, packed, bias, outputs, torch.bfloat16, gelu=gelu),
        {"bfloat16": torchs(torch.bfloat16), "float32": torchs(torch.float32)},
        2 * rows * inputs * outputs,
        "bf16_flops",
    )
