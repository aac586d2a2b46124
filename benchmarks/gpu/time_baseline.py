"""The strong baseline beside ours, in turns: torch's operators in bfloat16, a static cache, torch.compile, a graph."""

from __future__ import annotations

import functools
import statistics

import torch

from alitok_fast.config import GENERATORS
from alitok_fast.models import Generator, Tokenizer
from gpu.items import Context, Items, Number
from peers.compiled import Compiled
from peers.ours import Ours
from random_models import random_generator, random_tokenizer

items = Items()


@functools.cache
def models(context: Context) -> tuple[Generator, Tokenizer]:
    layers = context.pick(quick=2, full=GENERATORS["b"].num_layers)
    gen = random_generator("b", context.device, num_layers=layers)
    return gen, random_tokenizer(context.device, encoder_layers=1, decoder_layers=1)


def beside(context: Context, batch: int) -> list[Number]:
    gen, tokenizer = models(context)
    labels = torch.arange(batch, device=context.device)
    compiled = context.device.type == "cuda"  # on the CPU a compiler's minutes; the speed report has it
    ours = Ours(gen, None, batch, torch.bfloat16)
    baseline = Compiled(gen, tokenizer, batch, compiled, tuned=False)  # tuning takes minutes; the speed report has it
    count = context.pick(quick=4, full=gen.config.num_tokens)
    taken: dict[str, list[float]] = {"alitok_fast": [], "torch.compile" if compiled else "the same, uncompiled": []}
    for _ in range(context.pick(quick=1, full=3)):
        runs = (lambda: ours.generate(labels), lambda: baseline.generate(labels, steps=count))
        for (name, seconds), run in zip(taken.items(), runs, strict=True):
            steps = gen.config.num_tokens if name == "alitok_fast" else count
            seconds.append(context.seconds(run, rounds=1)[0] / steps)
    (_, mine), (other, theirs) = taken.items()
    numbers = [
        context.timed(f"batch {batch}, {name}: a step", seconds, read=ours.weight_bytes)
        for name, seconds in taken.items()
    ]
    times = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    return [*numbers, Number(f"batch {batch}: {other} takes", times, "times ours", key=f"batch {batch}:")]


for _batch in (1, 64):
    items(f"batch {_batch}", gpu=_batch > 1)(lambda context, batch=_batch: beside(context, batch))


if __name__ == "__main__":
    items.main()
