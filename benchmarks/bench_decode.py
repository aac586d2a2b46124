"""Cached passes of the generator, half-way through an image, beside the same in torch: steps, and windows of inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.ops.decode import decode_reference
from alitok_fast.testing import relative_error
from costs.cpu import cpu_step
from costs.parts import Work
from costs.reports import cpu_of
from floor import step_weights
from peers.eager import EagerLoop

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
ERROR = {
    "float32": 1e-4,
    "bfloat16": 5e-2,
    "int8": 5e-2,
}  # of logits


@pytest.mark.quick("b-int8-1", "b-bfloat16-8")
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("size", ["b", "l", "xl"])
def bench_decode(size, weights, batch, generator, mode, compare, ceilings, device):
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
    modelled = predicted(Work(gen.config, batch, weights, position=position), ceilings)
    compare(lambda: step(decoder, cache), alternatives, decoder.packed.step_bytes + seen, "read_bytes", modelled)


def predicted(work: Work, ceilings) -> Callable[[float], float] | None:
    """Seconds of a pass by the memory's bytes a second (benchmarks/cost.py); None where nothing is timed."""
    return ceilings and (lambda read_bytes: cpu_step(work, cpu_of(ceilings.to_dict(), read_bytes)).seconds)


WINDOWED = {"bfloat16": (torch.bfloat16, None), "int8": (torch.int8, None), "int8-by-int8": (torch.int8, torch.int8)}
ROWS_AND_COLUMNS = [(2, 1), (2, 2), (2, 4), (2, 8), (2, 16), (16, 1), (16, 4), (64, 1)]
SHAPES = [pytest.param(*shape, id="rows{}-columns{}".format(*shape)) for shape in ROWS_AND_COLUMNS]


@pytest.mark.quick("rows2-columns8-int8-by-int8")
@pytest.mark.parametrize("weights", WINDOWED)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def bench_decode_rows(rows, columns, weights, generator, mode, compare, ceilings, device):
    """A pass of B by rows and window. Its bound is what takes longer: the bytes, or the operations of its products."""
    if device.type != "cpu":
        pytest.skip("decode has no CUDA kernel; bench_sampling times the loop")
    gen, (dtype, activations) = generator("b"), WINDOWED[weights]
    position = gen.config.num_tokens // 2
    columns = min(columns, gen.config.num_tokens - position)
    decoder = PackedGenerator(gen, dtype, activations)
    cache = decoder.new_cache(rows)
    generated = torch.Generator().manual_seed(0)
    past = torch.randn(cache.keys.shape[:3] + (position, gen.config.head_dim), generator=generated)
    cache.keys[:, :, :, :position], cache.values[:, :, :, :position] = past, past.flip(1)
    ids = torch.randint(gen.config.codebook_size, (rows, columns), generator=generated)
    positions = torch.full((rows,), position)

    def whole():
        return decoder.step(ids, cache, positions)

    def one_by_one():
        return [decoder.step(ids[:, i : i + 1].contiguous(), cache, positions + i) for i in range(columns)]

    singles = torch.cat(one_by_one(), 1)
    assert torch.equal(whole(), singles), "a window changes the logits"
    if rows * columns == 2:  # the tests compare the others with it; here the definition takes seconds
        expected = decode_reference(decoder.packed, ids, cache.keys, cache.values, positions)
        assert relative_error(singles, expected) < (0.1 if activations else ERROR["int8"])
    seen = 2 * gen.config.num_layers * rows * gen.config.width * (position + columns) * cache.keys.element_size()
    read, operations = decoder.packed.step_bytes + seen, 2 * step_weights(gen.config) * rows * columns
    rate = "bf16_flops" if dtype == torch.bfloat16 else "int8_flops"
    by_operations = mode.timed and operations / getattr(ceilings, rate) > read / ceilings.read_bytes
    alternatives = {"one input at a time": one_by_one} if columns > 1 else {}
    if rows == 2:
        alternatives["torch float32, static cache"] = _in_torch(gen, ids, position)
    names = [str(one).removeprefix("torch.") if one else None for one in (dtype, activations)]
    work = Work(gen.config, rows // 2, names[0], None, names[1], columns, position)
    bound = (operations, rate) if by_operations else (read, "read_bytes")
    compare(whole, alternatives, *bound, predicted(work, ceilings))


def _in_torch(gen, ids, position):
    cache, positions = gen.new_cache(len(ids)), torch.full((len(ids),), position)
    return lambda: gen.step(ids, cache, positions)
