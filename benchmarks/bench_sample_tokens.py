"""sample_tokens at the official codebook size, beside the chain of torch operators that sampling loops use."""

from __future__ import annotations

import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.config import GENERATORS
from alitok_fast.ops.sample_tokens import sample_tokens

CODES = GENERATORS["b"].codebook_size


@pytest.fixture
def inputs(device):
    def make(batch, dtype=torch.float32):
        logits = 3 * torch.randn(2 * batch, CODES, generator=torch.Generator().manual_seed(0))
        state = {
            "guidance_scale": torch.tensor(4.0, device=device),
            "seed": torch.tensor(0, device=device),
            "image_ids": torch.arange(batch, device=device),
            "step": torch.tensor(7, device=device),
        }
        return logits.to(device, dtype), state

    return make


def chain(logits, scale, temperature, top_k, top_p):
    """What a sampling loop in torch does."""
    conditional, unconditional = logits.float().chunk(2)
    x = (unconditional + (conditional - unconditional) * scale) / temperature
    if top_k is not None:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
    probability = x.softmax(-1)
    if top_p is not None:
        ordered, order = probability.sort(descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        probability = torch.zeros_like(probability).scatter_(1, order, ordered)
    return probability.multinomial(1).squeeze(1)


@pytest.mark.quick("all-1", "both-64")
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (100, None), (None, 0.9), (1000, 0.9)], ids=["all", "top-k", "top-p", "both"]
)
def bench_sample_tokens(batch, top_k, top_p, inputs, compare):
    logits, state = inputs(batch)
    rule = {"temperature": 1.0, "top_k": top_k, "top_p": top_p}

    def own():
        return sample_tokens(logits, **rule, **state)

    def reference():
        with use_reference():
            return sample_tokens(logits, **rule, **state)

    # A near-tie may go either way in float32, one row in a hundred thousand; tests/ops proves each against float64.
    assert (own() != reference()).sum() <= 1
    alternatives = {
        "guidance, softmax, multinomial": lambda: chain(logits, state["guidance_scale"], **rule),
        "reference": reference,
    }
    compare(own, alternatives, logits.nbytes, "read_bytes")


@pytest.mark.quick("bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def bench_16_bit_logits(dtype, inputs, compare):
    logits, state = inputs(8, dtype)
    assert torch.equal(sample_tokens(logits, **state), sample_tokens(logits.float(), **state))
    alternatives = {
        "guidance, softmax, multinomial": lambda: chain(logits, state["guidance_scale"], 1.0, None, None),
        "float32 logits": lambda: sample_tokens(logits.float(), **state),
    }
    compare(lambda: sample_tokens(logits, **state), alternatives, logits.nbytes, "read_bytes")
