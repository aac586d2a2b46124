"""One cached step of the generator, half-way through an image, beside the same step in torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from eager import EagerLoop

from alitok_fast.config import generator_preset
from alitok_fast.decoding import Decoder
from alitok_fast.models import Generator
from alitok_fast.testing import relative_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
ERROR = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 5e-2}  # of logits, beside float32; tests/test_decoding.py says more


@pytest.fixture(scope="session")
def generator(mode):
    """make(name) -> a generator with random weights, cut short unless timed at full size."""
    made = {}

    def make(name: str) -> Generator:
        if name not in made:
            config = generator_preset(name)
            layers = mode.pick(check=2, quick=4, full=config.layers)
            torch.manual_seed(0)
            grid = mode.pick(check=4, quick=config.grid, full=config.grid)
            gen = Generator(dataclasses.replace(config, layers=layers, grid=grid)).eval().requires_grad_(False)
            for parameter in gen.parameters():
                if parameter.ndim == 2:
                    parameter.uniform_(-1, 1).mul_((3 / parameter.shape[1]) ** 0.5)
            made[name] = gen
        return made[name]

    return make


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("size", ["b", "l", "xl"])
def bench_decode(size, weights, batch, generator, mode, compare, device):
    if device.type != "cpu":
        pytest.skip("decode has no CUDA kernel; bench_sampling times the loop")
    if batch == 64 and not (mode.timed and not mode.quick):
        pytest.skip("batch 64 at full size only")
    gen = generator(size)
    position = gen.config.tokens // 2
    eager = EagerLoop(gen, torch.arange(batch))
    decoder = Decoder(gen, DTYPES[weights])
    cache, static = decoder.new_cache(2 * batch), gen.new_cache(2 * batch)
    assert relative_error(decoder.step(eager.ids, cache), eager.logits()) < ERROR[weights]
    for index in range(gen.config.layers):  # as if half an image were drawn
        past = torch.randn(2, 2 * batch, gen.config.heads, position, gen.config.head_dim)
        cache.keys[index, :, :, :position], cache.values[index, :, :, :position] = past
        static.keys[index, :, :, :position], static.values[index, :, :, :position] = past
        eager.caches[index] = tuple(past)
    eager.tokens = [eager.ids[:batch]] * position

    def step(model, cache):
        cache.position.fill_(position)
        return model.step(eager.ids, cache)

    def eager_step():
        before = list(eager.caches)
        logits = eager.logits()
        eager.caches = before
        return logits

    assert relative_error(step(decoder, cache), eager_step()) < ERROR[weights]
    seen = 2 * gen.config.layers * 2 * batch * gen.config.width * position * cache.keys.element_size()
    alternatives = {
        "eager float32, restated reference": eager_step,
        "torch float32, static cache": lambda: step(gen, static),
    }
    compare(lambda: step(decoder, cache), alternatives, decoder.packed.step_bytes + seen, "read_bytes")
