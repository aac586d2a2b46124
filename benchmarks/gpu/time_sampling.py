"""Where the time of an image goes: steps of B by batch and precision, the kernels of one step, the decode to pixels.

Beside each step stands what the model of benchmarks/cost.py predicts, with its terms in the log.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, replace

import torch

from alitok_fast.config import GENERATORS, TOKENIZERS
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.models import Generator
from alitok_fast.ops.fused_linear import CLUSTER_ROWS, fused_rows, has_clusters
from cost import report
from costs.cpu import cpu_step
from costs.gpu import LAUNCHES, Launches, gpu_step
from costs.parts import Step, Work
from costs.reports import cpu_of, gpu_of
from floor import Machine, decode_floor, tokens_floor
from gpu.items import Context, Items, Number, Skipped
from gpu.torch_alone import graph_nodes
from peers.ours import Ours
from random_models import random_generator, random_tokenizer

BF16, INT8, E4M3 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
PRECISIONS = {"bf16": (BF16, None), "e4m3 cache": (BF16, E4M3), "int8 weights": (INT8, None)}
BATCHES = (1, 8, 64, 256)
items = Items()


@functools.cache
def generator(context: Context) -> Generator:
    layers = context.pick(quick=2, full=GENERATORS["b"].num_layers)
    return random_generator("b", context.device, num_layers=layers)


def machine(context: Context, dtype: torch.dtype) -> Machine:
    """The ceilings for products in `dtype`; on a GPU 8-bit weights are multiplied in bfloat16."""
    most = context.ceilings
    eight_bits = dtype == INT8 and context.device.type == "cpu"
    return Machine(most.int8_flops if eight_bits else most.bf16_flops, most.read_bytes)


def least(context: Context, ours: Ours, weights: torch.dtype) -> float | None:
    """Seconds for a step, the mean over an image, by what it reads and multiplies."""
    if context.ceilings is None:
        return None
    config, batch = ours.gen.config, ours.loop.batch_size
    whole = tokens_floor(config, batch, ours.weight_bytes, ours.kv_bytes, machine(context, weights))
    return whole / config.num_tokens


@functools.cache
def node(context: Context) -> float:
    """Seconds of a node of a graph, on this GPU."""
    return graph_nodes(context)[0].value * 1e-6


def launches(device: torch.device) -> Launches:
    """How a step is run here: as many rows fused as the library says, by clusters where the device has them."""
    rows = dict(fused_rows=fused_rows(BF16, device), fused_rows_8=fused_rows(INT8, device))
    clusters = {"cluster_rows": CLUSTER_ROWS[BF16][0], "cluster_rows_8": CLUSTER_ROWS[INT8][0]}
    if not has_clusters(device):
        clusters = dict.fromkeys(clusters)
    return replace(LAUNCHES["present"], **rows, **clusters)


def predicted(context: Context, batch: int, weights: torch.dtype, kv_dtype: torch.dtype | None) -> Step | None:
    """A step by the model, whose table goes to the log: where a measurement differs, a kernel's row tells which term
    is wrong. None where there are no ceilings."""
    if context.ceilings is None:
        return None
    formats = [None if dtype is None else str(dtype).removeprefix("torch.") for dtype in (weights, kv_dtype)]
    work, most = Work(generator(context).config, batch, *formats), asdict(context.ceilings)
    if context.device.type == "cpu":
        step = cpu_step(work, cpu_of(most))
    else:
        step = gpu_step(work, gpu_of({**most, "node": node(context)}), launches(context.device))
    print(report(work, step, "predicted"))
    return step


def steps(context: Context, batch: int, name: str) -> list[Number]:
    weights, kv_dtype = PRECISIONS[name]
    if context.device.type == "cpu" and (kv_dtype is not None or batch > 8):
        raise Skipped("needs a GPU")
    gen, images = generator(context), context.pick(quick=min(batch, 2), full=batch)
    ours = Ours(gen, None, images, weights, kv_dtype)
    labels, count = torch.arange(images, device=context.device), gen.config.num_tokens
    seconds = context.seconds(lambda: ours.generate(labels), rounds=context.pick(quick=1, full=5 if batch <= 8 else 3))
    key = f"batch {batch}" if name == "bf16" else ""
    name = f"B x {gen.config.num_layers} layers, batch {images}, {name}"
    timed = context.timed(f"{name}: a step", seconds, count, least=least(context, ours, weights), key=key)
    step = predicted(context, images, weights, kv_dtype)
    if step is None:
        return [timed]
    title, milliseconds = f"{name}: predicted by benchmarks/cost.py", 1e3 * step.seconds
    said = Number(title, milliseconds, "ms", timed.floor, timed.floor_is)
    return [timed, said, Number(f"{name}: measured / predicted", timed.value / milliseconds, "times")]


for _batch in BATCHES:
    for _name in PRECISIONS:
        items(f"steps, batch {_batch}, {_name}")(lambda context, b=_batch, n=_name: steps(context, b, n))


@items("kernels of a step", gpu=True)
def kernels_of_a_step(context: Context) -> list[Number]:
    """One replay of the graph under torch's profiler; the log has each kernel."""
    numbers = []
    for batch in (1, 8, 64):
        ours = Ours(generator(context), None, batch, BF16)
        ours.generate(torch.arange(batch, device=context.device))  # captures
        ours.loop.state.positions.fill_(ours.gen.config.num_tokens // 2)  # the mean of what attention sees
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ours.loop.advance(1)
            torch.cuda.synchronize()
        table = profile.key_averages()
        print(f"batch {batch}\n{table.table(sort_by='self_device_time_total', row_limit=25, max_name_column_width=90)}")
        kernels = [entry for entry in table if entry.self_device_time_total > 0]  # calls of the driver stand there too
        busy = sum(entry.self_device_time_total for entry in kernels)
        step = predicted(context, batch, BF16, None)
        numbers += [
            Number(f"batch {batch}: nodes", sum(entry.count for entry in kernels), "count"),
            *([] if step is None else [Number(f"batch {batch}: nodes, predicted", step.kernels, "count")]),
            context.timed(f"batch {batch}: kernels, without the gaps", [busy / 1e6], least=least(context, ours, BF16)),
        ]
    return numbers


@items("stage-2 decode")
def decode(context: Context) -> list[Number]:
    small = {"encoder_layers": 1, **context.pick(quick={"decoder_layers": 2}, full={})}  # the encoder takes no part
    tokenizer = random_tokenizer(context.device, **small)
    config, numbers = tokenizer.config, []
    images = ImageDecoder(tokenizer, BF16)
    for batch in context.pick(quick=(1,), full=(1, 8, 64)):
        tokens = torch.zeros(batch, TOKENIZERS["256"].num_tokens, dtype=torch.int64, device=context.device)
        floor = None if context.ceilings is None else decode_floor(config, batch, 2, machine(context, BF16))
        seconds = context.seconds(lambda tokens=tokens: images(tokens), rounds=context.pick(quick=2, full=10))
        numbers.append(context.timed(f"{config.decoder_layers} layers, batch {batch}, bf16", seconds, least=floor))
    return numbers


if __name__ == "__main__":
    items.main()
