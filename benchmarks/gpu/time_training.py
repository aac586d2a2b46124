"""One step of training B: forward, backward, clipping, AdamW, as the training loop does it; and where its time goes."""

from __future__ import annotations

import functools

import torch
from torch import nn

from alitok_fast.config import GENERATORS
from alitok_fast.training.config import GeneratorTrainConfig
from alitok_fast.training.losses import generator_loss
from alitok_fast.training.optim import adamw
from floor import step_weights
from gpu.items import Context, Items, Number
from random_models import random_generator

items = Items()


class Training:
    """A step on random tokens, in bfloat16 autocast."""

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, GENERATORS["b"]
        self.batch = context.pick(quick=1, full=64)
        layers = context.pick(quick=2, full=self.config.num_layers)
        self.gen = random_generator("b", context.device, num_layers=layers).train().requires_grad_(True)
        self.optimizer = adamw(self.gen, GeneratorTrainConfig())
        shape = self.batch, self.config.num_tokens
        self.tokens = torch.randint(self.config.codebook_size, shape, device=context.device)
        self.labels = torch.arange(self.batch, device=context.device)

    def __call__(self) -> torch.Tensor:
        with torch.autocast(self.context.device.type, torch.bfloat16):
            loss = generator_loss(self.gen(self.tokens, self.labels), self.tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.gen.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @property
    def flops(self) -> float:
        """Six for each weight and position, and attention's seven products over the visible pairs."""
        config, length = self.gen.config, 1 + self.config.num_tokens
        attention = config.num_layers * 7 * 2.0 * (length * (length + 1) // 2) * config.width * self.batch
        return 6.0 * step_weights(config) * length * self.batch + attention


@functools.cache
def training(context: Context) -> Training:
    return Training(context)


@items("a step of B")
def step(context: Context) -> list[Number]:
    train = training(context)
    first = train().item()
    seconds = context.seconds(train, rounds=context.pick(quick=1, full=10))
    last = train().item()
    assert torch.isfinite(torch.tensor([first, last])).all(), f"loss: expected finite numbers, got {first}, {last}"
    assert last < first, f"loss: expected it to fall on one batch, got {first} and then {last}"
    name = f"batch {train.batch}, {train.gen.config.num_layers} layers, bf16 autocast"
    number = context.timed(name, seconds, flops=train.flops, key="step")
    return [number, Number("images", train.batch / number.value * 1e3, "per second", key="images")]


@items("kernels of a step", gpu=True)
def kernels(context: Context) -> list[Number]:
    """The log has each kernel."""
    train = training(context)
    train()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train()
        torch.cuda.synchronize()
    table = profile.key_averages()
    print(table.table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90))
    busy = sum(entry.self_device_time_total for entry in table)
    own = sum(entry.self_device_time_total for entry in table if "alitok" in entry.key)
    return [
        context.timed("kernels", [busy / 1e6], flops=train.flops),
        Number("of their time, our own kernels", own / busy, "share"),
        Number("memory", torch.cuda.max_memory_allocated() / 2**30, "GiB"),
    ]


if __name__ == "__main__":
    items.main()
