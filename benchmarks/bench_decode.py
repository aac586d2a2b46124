"""One cached step of the generator, half-way through an image, beside the same step in torch."""

from __future__ import annotations

import pytest
import torch

from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.ops.decode import decode_reference
from alitok_fast.testing import relative_error
from peers.eager import EagerLoop

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
ERROR = {
    "float32": 1e-4,
    "bfloat16": 5e-2,
    "int8": 5e-2,
}  # of logits


@pytest.mark.quick("b-float32-1", "b-int8-1", "b-bfloat16-8")
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("size", ["b", "l", "xl"])
def bench_decode(size, weights, batch, generator, mode, compare, device):
    if device.type != "cpu":
        pytest.skip("decode has no CUDA kernel; bench_sampling times the loop")
    if batch == 32 and (size != "b" or not mode.timed or mode.quick):
        pytest.skip("batch 32 of B at full size only: the float32 peers' caches take gigabytes")
    gen = generator(size)
    position = gen.config.num_tokens // 2
    eager = EagerLoop(gen, torch.arange(batch))
    decoder = PackedGenerator(gen, DTYPES[weights])
    cache, static = decoder.new_cache(2 * batch), gen.new_cache(2 * batch)
    ids, start = eager.ids[:, None], torch.zeros(2 * batch, dtype=torch.int64)
    assert relative_error(decoder.step(ids, cache, start).squeeze(1), eager.logits()) < ERROR[weights]
    for index in range(gen.config.num_layers):  # as if half an image were sampled
        past = torch.randn(2, 2 * batch, gen.config.num_heads, position, gen.config.head_dim)
        cache.keys[index, :, :, :position], cache.values[index, :, :, :position] = past
        static.keys[index, :, :, :position], static.values[index, :, :, :position] = past
        eager.caches[index] = tuple(past)
    eager.tokens = [eager.ids[:batch]] * position

    positions = torch.full((2 * batch,), position)

    def step(model, cache):
        return model.step(eager.ids[:, None], cache, positions).squeeze(1)

    def eager_step():
        before = list(eager.caches)
        logits = eager.logits()
        eager.caches = before
        return logits

    # A random past amplifies the rounding of weights, so each is held to the weights that it has.
    expected = decode_reference(decoder.packed, eager.ids[:, None], cache.keys, cache.values, positions)
    assert relative_error(step(decoder, cache), expected.squeeze(1)) < ERROR[weights]
    assert relative_error(step(gen, static), eager_step()) < ERROR["float32"]
    seen = 2 * gen.config.num_layers * 2 * batch * gen.config.width * position * cache.keys.element_size()
    alternatives = {
        "eager float32, restated reference": eager_step,
        "torch float32, static cache": lambda: step(gen, static),
    }
    compare(lambda: step(decoder, cache), alternatives, decoder.packed.step_bytes + seen, "read_bytes")
