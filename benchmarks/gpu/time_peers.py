"""Whole images beside the reference, and beside diffusion at the same resolution, of many steps and of one.

The reference is run where its checkout is at hand (`--reference-repo`), else what this suite restates of it. Diffusion
needs the package diffusers.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from alitok_fast.config import GENERATORS, TOKENIZERS
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.models import Generator, Tokenizer
from gpu.items import Context, Items, Number, Skipped
from gpu.torch_alone import graphed
from peers import System, diffusion
from peers.eager import Eager
from peers.ours import Ours
from peers.reference import Reference, load_reference
from random_models import random_generator, random_tokenizer
from timing import Missing

BF16 = torch.bfloat16
BATCHES = (1, 8, 64)
items = Items()


@functools.cache
def models(context: Context) -> tuple[Generator, Tokenizer]:
    config = TOKENIZERS["256"]
    gen = random_generator("b", context.device, num_layers=context.pick(quick=2, full=GENERATORS["b"].num_layers))
    decoder_layers = context.pick(quick=2, full=config.decoder_layers)
    encoder_layers = context.pick(quick=1, full=config.encoder_layers)  # the reference takes whole weights only
    return gen, random_tokenizer(context.device, encoder_layers=encoder_layers, decoder_layers=decoder_layers)


@functools.cache
def ours(context: Context, batch: int) -> Callable[[], object]:
    gen, tokenizer = models(context)
    return images_of(Ours(gen, ImageDecoder(tokenizer, BF16), batch, BF16), context, batch)


@functools.cache
def reference(context: Context) -> tuple[str, System]:
    """The reference in float32, as published, and what it is called."""
    gen, tokenizer = models(context)
    checkout = os.environ.get("ALITOK_REFERENCE_REPO")
    if checkout and not context.quick:  # its models have full size only
        loaded = load_reference(Path(checkout), "b", gen, tokenizer)
        if not isinstance(loaded, Missing):
            return "reference, fp32", Reference(*loaded, gen, autocast=False)
        print(loaded.reason)
    return "restated reference, fp32", Eager(gen, tokenizer)


def images_of(system: System, context: Context, batch: int) -> Callable[[], object]:
    labels = torch.arange(batch, device=context.device)
    return lambda: system.decode(system.generate(labels))


def in_turns(context: Context, batch: int, runs: dict[str, Callable[[], object]], rounds: int) -> list[Number]:
    """Times of whole images, and how many times ours (the first) each other one takes, by rounds. Ours runs once
    before; the others take seconds, and need no warming."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    first, *others = runs
    runs[first]()
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name] += context.seconds(run, rounds=1, warm=False)
    numbers = [timed_image(batch, name, seconds) for name, seconds in taken.items()]
    for name in others:
        times = statistics.median(b / a for a, b in zip(taken[first], taken[name], strict=True))
        numbers.append(Number(f"batch {batch}: {name} takes", times, "times ours", key=f"batch {batch}:"))
    return numbers


def timed_image(batch: int, name: str, seconds: list[float]) -> Number:
    spread = min(seconds), max(seconds), len(seconds)
    return Number(f"batch {batch}, {name}: images", statistics.median(seconds), "s", spread=spread)


def beside_reference(context: Context, batch: int) -> list[Number]:
    name, system = reference(context)
    runs = {"alitok_fast bf16": ours(context, batch), name: images_of(system, context, batch)}
    return in_turns(context, batch, runs, rounds=context.pick(quick=1, full=3 if batch == 1 else 2))


def beside_diffusion(context: Context, batch: int) -> list[Number]:
    """A guided step of DiT-XL/2 in bfloat16, launched by the host and as a CUDA graph, 250 of which are an image; and
    the whole image of one-step generators (`peers.diffusion.Dit.one_step`) as a CUDA graph."""
    if reason := diffusion.missing():
        raise Skipped(reason.reason)
    cut, rounds = context.pick(quick={"layers": 1, "latent": 8}, full={}), context.pick(quick=1, full=5)
    dits = {
        name: diffusion.Dit(dataclasses.replace(size, **cut), batch, context.device)
        for name, size in diffusion.SIZES.items()
    }
    autoencoder = diffusion.Autoencoder(context.device, **context.pick(quick={"channels": (32, 64)}, full={}))
    xl = dits.pop(diffusion.GUIDED)
    guided = diffusion.Diffusion(xl)
    timestep = guided.schedule.timesteps[0]
    runs = {
        # Without the scheduler, which reads the time on the host.
        "step, graph": lambda: guided.noise(timestep),
        "VAE decode": lambda: autoencoder.decode(xl.latents),
        "one step and VAE decode": lambda: autoencoder.decode(xl.one_step()),
    }
    for name, dit in dits.items():
        runs[f"{name}, one step and VAE decode"] = lambda dit=dit: autoencoder.decode(dit.one_step())
    times = {"step, eager": context.seconds(guided.step, rounds)}
    times |= {name: context.seconds(graphed(run, context), rounds) for name, run in runs.items()}
    times["alitok_fast bf16: images"] = context.seconds(ours(context, batch), rounds=min(rounds, 3))
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    numbers = [
        Number(f"batch {batch}, {name}", middle[name], "s", spread=(min(seconds), max(seconds), len(seconds)))
        for name, seconds in times.items()
    ]
    steps, decode, fast = diffusion.STEPS, middle["VAE decode"], min(middle["step, eager"], middle["step, graph"])
    images = {
        f"{diffusion.GUIDED} with {steps} steps, eager": steps * middle["step, eager"] + decode,
        f"{diffusion.GUIDED} with {steps} steps": steps * fast + decode,
        f"{diffusion.GUIDED} with one step": middle["one step and VAE decode"],
    }
    images |= {f"{name} with one step": middle[f"{name}, one step and VAE decode"] for name in dits}
    for name, seconds in images.items():
        key = f"DiT, batch {batch}:" if name.endswith(f" {steps} steps") else ""
        times_ours = seconds / middle["alitok_fast bf16: images"]
        numbers.append(Number(f"batch {batch}: {name} takes", times_ours, "times ours", key=key))
    return numbers


for _batch in BATCHES:
    items(f"reference, batch {_batch}", gpu=_batch > 1)(lambda context, b=_batch: beside_reference(context, b))
for _batch in BATCHES:
    items(f"diffusion, batch {_batch}", gpu=_batch > 1)(lambda context, b=_batch: beside_diffusion(context, b))


if __name__ == "__main__":
    items.main()
