"""vq_lookup at the official codebook size, beside the formula, torch's best, and the compiled formula."""

from __future__ import annotations

import pytest
import torch

from alitok_fast.config import TOKENIZERS
from alitok_fast.ops.vq_lookup import vq_lookup, vq_lookup_reference
from alitok_fast.testing import assert_nearest, vq_inputs

CONFIGS = [pytest.param(TOKENIZERS[name], id=name) for name in ("256", "demo")]


@pytest.fixture
def inputs(mode, device):
    def make(config):
        features = mode.pick(check=1500, quick=5000, full=20_000)
        return [t.to(device) for t in vq_inputs(features, config.codebook_size, config.code_dim)]

    return make


def addmm_argmin(z, codebook):
    """The fastest that torch's operators do for the indices alone."""
    return torch.addmm(codebook.square().sum(1), z, codebook.T, alpha=-2).argmin(1)


def check(z, codebook, indices):
    """Features from the whole range: float64 distances of all of them would take longer than the benchmark."""
    some = slice(None, None, max(1, len(z) // 1000))
    assert_nearest(z[some], codebook, indices[some])


def alternatives(mode, config, z, codebook):
    functions = {
        "formula": lambda: vq_lookup_reference(z, codebook),
        "addmm + argmin (indices only)": lambda: addmm_argmin(z, codebook),
    }
    if mode.timed and not mode.quick and config is TOKENIZERS["256"]:  # compiling takes longer than all the rest
        compiled = torch.compile(vq_lookup_reference)
        functions["compiled formula"] = lambda: compiled(z, codebook)
    return functions


@pytest.mark.quick("256", "demo")
@pytest.mark.parametrize("config", CONFIGS)
def bench_forward(config, inputs, mode, compare):
    z, codebook = inputs(config)
    check(z, codebook, vq_lookup(z, codebook).indices)
    some = z[:1000]
    result = vq_lookup(some, codebook)
    assert_nearest(some, codebook, result.indices, result.closest)
    work = 2 * z.numel() * len(codebook)
    compare(lambda: vq_lookup(z, codebook), alternatives(mode, config, z, codebook), work, "fp32_flops")


@pytest.mark.quick
def bench_encode_only(inputs, mode, compare):
    """Without each code's closest feature."""
    z, codebook = inputs(TOKENIZERS["256"])
    check(z, codebook, vq_lookup(z, codebook, with_closest=False).indices)
    functions = {"addmm + argmin (indices only)": lambda: addmm_argmin(z, codebook)}
    work = 2 * z.numel() * len(codebook)
    compare(lambda: vq_lookup(z, codebook, with_closest=False), functions, work, "fp32_flops")


@pytest.mark.quick("256")
@pytest.mark.parametrize("config", CONFIGS)
def bench_forward_backward(config, inputs, compare):
    z, codebook = (t.requires_grad_() for t in inputs(config))
    weight = torch.randn_like(z)

    def gradients(operator):
        result = operator(z, codebook)
        return torch.autograd.grad(
            [result.quantized, result.loss], [z, codebook], [weight, torch.ones_like(result.loss)]
        )

    for got, expected in zip(gradients(vq_lookup), gradients(vq_lookup_reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    functions = {"formula": lambda: gradients(vq_lookup_reference)}
    compare(lambda: gradients(vq_lookup), functions, 2 * z.numel() * len(codebook), "fp32_flops")
