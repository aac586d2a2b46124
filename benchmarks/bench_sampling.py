"""Whole images, tokens only, with guidance: packed weights beside the reference's way of sampling."""

from __future__ import annotations

import pytest
import torch
from bench_decode import generator  # noqa: F401 - a fixture
from eager import EagerLoop, sample_eagerly

from alitok_fast.decoding import Decoder
from alitok_fast.sampling import sample
from alitok_fast.testing import relative_error


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("size", ["b"])
def bench_sampling(size, batch, generator, compare, device):  # noqa: F811
    if device.type != "cpu":
        pytest.skip("packed decoders are for the CPU")
    gen = generator(size)
    labels = torch.arange(batch)
    packed = {dtype: Decoder(gen, dtype) for dtype in (torch.int8, torch.bfloat16, torch.float32)}
    first = EagerLoop(gen, labels)
    logits = packed[torch.float32].step(first.ids, packed[torch.float32].new_cache(2 * batch))
    assert relative_error(logits, first.logits()) < 1e-4

    own = packed[torch.int8]
    alternatives = {
        "bfloat16 weights": lambda: sample(packed[torch.bfloat16], labels),
        "float32 weights": lambda: sample(packed[torch.float32], labels),
        "eager float32, restated reference": lambda: sample_eagerly(gen, labels),
    }
    config = gen.config
    context = config.tokens * (config.tokens + 1) // 2
    seen = 2 * config.layers * 2 * batch * config.width * context * own.cache_dtype.itemsize
    compare(lambda: sample(own, labels), alternatives, config.tokens * own.packed.step_bytes + seen, "read_bytes")
