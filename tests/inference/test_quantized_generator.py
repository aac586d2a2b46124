"""A generator with 8-bit weights steps as one whose weights are those rounded ones."""

import copy

import pytest
import torch
from torch import nn

from alitok_fast import plan, sample
from alitok_fast._library import use_reference
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.ops.quantized_linear import LARGEST, dequantize_weight, quantize_weight
from alitok_fast.testing import step_logits

WEIGHTS = pytest.mark.parametrize("weights", list(LARGEST), ids=["int8", "e4m3"])


def written_out(gen, weights):
    """The generator with the rounded weights in its own dtype."""
    gen = copy.deepcopy(gen)
    for module in gen.blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = dequantize_weight(*quantize_weight(module.weight, weights)).to(module.weight.dtype)
    return gen


def logits_of(model, ids, labels):
    fed = torch.cat([model.condition_ids(labels, len(ids))[:, None], ids], 1)
    return step_logits(model, fed, model.new_cache(len(ids)))


@WEIGHTS
def test_logits_are_those_of_the_rounded_weights(device, tiny_generator, weights):
    gen = tiny_generator().to(device)
    ids, labels = torch.arange(15, device=device).view(3, 5) % gen.config.codebook_size, torch.arange(3, device=device)
    quantised = logits_of(QuantizedGenerator(gen, weights), ids, labels)
    torch.testing.assert_close(quantised, logits_of(written_out(gen, weights), ids, labels), rtol=1e-4, atol=1e-4)
    original = logits_of(gen, ids, labels)
    assert not torch.equal(quantised, original)
    assert (quantised - original).norm() < (0.05 if weights == torch.int8 else 0.15) * original.norm()
    with use_reference():
        torch.testing.assert_close(
            logits_of(QuantizedGenerator(gen, weights), ids, labels), quantised, rtol=1e-4, atol=1e-4
        )


@WEIGHTS
def test_sampling(device, tiny_generator, weights):
    """Beside the generator with the rounded weights, greedily: the same tokens but for near-ties."""
    gen = tiny_generator().to(device)
    options = {"guidance_scale": 1.5, "temperature": 0}
    tokens = sample(QuantizedGenerator(gen, weights), range(10), **options)
    assert tokens.shape == (10, gen.config.num_tokens)
    assert (tokens == sample(written_out(gen, weights), range(10), **options)).float().mean() > 0.9


def test_more_rows_than_the_kernel_takes(device, tiny_generator):
    quantised = QuantizedGenerator(tiny_generator().to(device), torch.int8)
    labels = [i % 10 for i in range(20)]  # 40 rows with guidance
    together, first = sample(quantised, labels, seed=3), sample(quantised, labels[:4], seed=3)
    assert (together[:4] == first).float().mean() > 0.9


@WEIGHTS
def test_the_generator_stays_as_it_was(tiny_generator, weights):
    gen = tiny_generator()
    before = {name: tensor.clone() for name, tensor in gen.state_dict().items()}
    quantised = QuantizedGenerator(gen, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gen.state_dict().items())
    assert isinstance(gen.blocks[0].attn.qkv, nn.Linear)
    layers = [m for m in gen.blocks.modules() if isinstance(m, nn.Linear)]
    linear = sum(m.weight.numel() for m in layers)
    rest = sum(t.numel() for t in gen.blocks.state_dict().values()) - linear
    scales = sum(m.out_features * -(-m.in_features // 64) for m in layers)
    assert quantised.weight_bytes == linear + 4 * rest + 2 * scales


def test_memory_plan_counts_the_cache_in_the_dtype_of_the_activations(tiny_generator):
    gen = tiny_generator().bfloat16()
    quantised = QuantizedGenerator(gen, torch.int8)
    assert quantised.new_cache(1).keys.dtype == torch.bfloat16
    assert plan(quantised).bytes_per_image == plan(gen).bytes_per_image
    smaller = plan(quantised, kv_dtype=torch.float8_e4m3fn)
    assert smaller.bytes_per_image < plan(quantised).bytes_per_image


def test_other_dtypes_are_refused(tiny_generator):
    with pytest.raises(ValueError, match="dtype: expected int8 or float8_e4m3fn, got bfloat16"):
        QuantizedGenerator(tiny_generator(), torch.bfloat16)
