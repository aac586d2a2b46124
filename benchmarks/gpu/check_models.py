"""Whole models: the samples of the one that ships, golden outputs of B, graphs, repeats, threads on their own streams.

On a GPU the CPU is what results are compared with; on the CPU, torch's own operators (`use_reference`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alitok_fast import load_generator, load_tokenizer
from alitok_fast._library import use_reference
from alitok_fast.config import generator_preset
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.inference.sampler import Sampler, guidance_schedule
from alitok_fast.models import Generator
from alitok_fast.models.loading import build
from alitok_fast.ops.sample_tokens import guided_logits
from alitok_fast.storage.checkpoint import Checkpoint
from alitok_fast.testing import relative_error, step_logits
from ceilings import synchronize
from gpu.items import Context, Items, Number, Skipped, same, within

ROOT = Path(__file__).resolve().parents[2]
LABELS = torch.arange(8)
items = Items()


def demo(context: Context) -> Generator:
    return load_generator("demo", context.device).requires_grad_(False)


def follow(model: Any, labels: Tensor, tokens: Tensor, kv_dtype: torch.dtype | None = None) -> Tensor:
    """(steps, 2 B, K) logits before each of the given tokens, conditional rows first."""
    condition = torch.cat([model.condition_ids(labels, len(labels)), model.condition_ids(None, len(labels))])
    fed = torch.cat([condition[:, None], tokens[:, :-1].repeat(2, 1)], 1)
    return step_logits(model, fed, model.new_cache(2 * len(labels), kv_dtype)).transpose(0, 1)


def other_operators(context: Context) -> contextlib.AbstractContextManager:
    """Where what is compared with runs on the same device, it runs on torch's operators."""
    return use_reference() if context.device.type == "cpu" else contextlib.nullcontext()


@items("demo, greedy")
def demo_greedy(context: Context) -> list[Number]:
    """Every token sampled is the largest of the logits elsewhere, or cannot be told from it in float32."""
    labels = LABELS[: context.pick(quick=2, full=None)]
    tokens = Sampler(demo(context))(labels, temperature=0.0).cpu()
    exact = load_generator("demo").requires_grad_(False)
    config = exact.config
    with other_operators(context):
        logits = follow(exact, labels, tokens)
    schedule = guidance_schedule(config.num_tokens, config.guidance_scale, config.guidance_power)
    guided = torch.stack([guided_logits(row, scale) for row, scale in zip(logits, schedule, strict=True)], 1)
    behind = (guided.amax(-1) - guided.gather(2, tokens.unsqueeze(2)).squeeze(2)).max().item()
    equal = (guided.argmax(-1) == tokens).float().mean().item()
    bound = 1e-4 * guided.abs().max().item()
    return [
        within("behind the largest", behind, bound, "logits"),
        Number("equal tokens", equal, "share", key="equal tokens"),
    ]


@items("demo, images")
def demo_images(context: Context) -> list[Number]:
    """Pixels in float32 within a thousandth, in bfloat16 half a grey level (rms)."""
    tokenizer, exact = load_tokenizer("demo", context.device), load_tokenizer("demo")
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(exact.config.codebook_size, (8, exact.config.num_tokens), generator=rng)
    with other_operators(context), torch.no_grad():
        expected = exact.decode(tokens)
    numbers = []
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 0.5 / 255)):
        error = ImageDecoder(tokenizer, dtype)(tokens.to(context.device)).cpu() - expected
        name = f"pixels, {str(dtype).removeprefix('torch.')}, rms"
        numbers.append(within(name, error.square().mean().sqrt().item(), bound, "of white"))
    return numbers


@items("a graph samples as single steps do")
def graph_as_steps(context: Context) -> list[Number]:
    """To the last bit. On the CPU: many steps in one native call."""
    sampler, settings = Sampler(demo(context)), dict(seed=3)
    sampled = sampler(LABELS, **settings)
    loop = sampler.loop(len(LABELS), guided=True)
    config = sampler.model.config
    schedule = guidance_schedule(config.num_tokens, config.guidance_scale, config.guidance_power)
    ids = torch.arange(len(LABELS), device=context.device)
    loop.start(LABELS.to(context.device), schedule, SamplingParams(seed=3), ids, None)
    with torch.no_grad():
        for _ in range(config.num_tokens):
            loop.do_pass()
    return [same("tokens", sampled, loop.state.tokens)]


@items("a window samples as single steps do")
def windows_as_steps(context: Context) -> list[Number]:
    """Tokens of windows of several, in graphs of their own. A library's products of more rows may round otherwise: a
    near-tie may go the other way, after which the rest of an image is another."""
    gen, numbers = demo(context), []
    expected = Sampler(gen)(LABELS, seed=3)
    for window in (2, 4, 16):
        tokens = Sampler(gen, window=window)(LABELS, seed=3)
        differing = (tokens != expected).any(1).double().mean().item()
        numbers.append(within(f"images that differ, window {window}", differing, 0.5, "share"))
    return numbers


@items("twice the same bits")
def twice(context: Context) -> list[Number]:
    gen, tokenizer = demo(context), load_tokenizer("demo", context.device)
    runs = []
    for _ in range(2):
        tokens = Sampler(gen)(LABELS, seed=1)
        runs.append((tokens, ImageDecoder(tokenizer)(tokens)))
    (tokens, images), (more_tokens, more_images) = runs
    return [same("tokens", tokens, more_tokens), same("pixels", images, more_images)]


@items("threads on streams of their own")
def threads(context: Context) -> list[Number]:
    """Two threads share a sampler and an image decoder; each has what it would have had alone."""
    sampler, decode = Sampler(demo(context)), ImageDecoder(load_tokenizer("demo", context.device))
    batches = [LABELS[:4], LABELS[4:]]
    alone = [images_of(sampler, decode, batch) for batch in batches]
    synchronize(context.device)
    got: list[list[Tensor]] = [[], []]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with stream_of_its_own(context.device):
                for _ in range(context.pick(quick=2, full=10)):
                    got[index].append(images_of(sampler, decode, batches[index]))
        except BaseException as error:  # a thread's error would pass unseen
            errors.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    synchronize(context.device)
    return [same("images", images, alone[index]) for index in range(2) for images in got[index]][:1]


def images_of(sampler: Sampler, decode: ImageDecoder, labels: Tensor) -> Tensor:
    return decode(sampler(labels, seed=2))


@contextlib.contextmanager
def stream_of_its_own(device: torch.device):
    """The thread's work goes to a new stream, which has ended with the block."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@items("golden logits of B")
def golden_b(context: Context) -> list[Number]:
    """Along the reference implementation's tokens: float32 to 1e-4, and what reduced precision changes."""
    gen, outputs = golden("b")
    steps = context.pick(quick=3, full=35)
    with torch.no_grad():
        logits = follow(fast(gen, context, torch.float32), *on(context, outputs, steps)).cpu()
    at = [i for i, position in enumerate(outputs["positions"]) if position < steps]
    got = logits[outputs["positions"][at]].unflatten(1, (2, -1)).permute(1, 2, 0, 3)
    numbers = []
    for rows, name in zip(got, ("logits_cond", "logits_uncond"), strict=True):
        numbers.append(within(f"float32, {name}", relative_error(rows, outputs[name][:, at]), 1e-4, key=name))
    scale = torch.tensor(gen.config.guidance_scale)
    for label, make, bound in reduced(context):
        model, kv_dtype = make(gen)
        with torch.no_grad():
            lower = follow(model, *on(context, outputs, steps), kv_dtype).cpu()
        errors = [
            relative(guided_logits(got, scale), guided_logits(wanted, scale))
            for got, wanted in zip(lower, logits, strict=True)
        ]
        numbers.append(within(f"{label}, guided at {scale:g}", max(errors), bound))
    return numbers


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def golden(size: str) -> tuple[Generator, dict[str, Tensor]]:
    """The generator with weights drawn from their names, on the CPU, and the reference implementation's outputs."""
    folder = Path(os.environ.get("ALITOK_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        raise Skipped("no golden outputs here (ALITOK_GOLDEN names their folder)")
    spec = importlib.util.spec_from_file_location("golden_recipe", folder / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    state = {key: torch.from_numpy(value) for key, value in recipe.state_dict(f"ar_{size}").items()}
    gen = build(Checkpoint(generator_preset(size), state)).eval().requires_grad_(False)
    with np.load(folder / f"ar_{size}.npz") as file:
        return gen, {name: torch.from_numpy(file[name]) for name in file.files}


def on(context: Context, outputs: dict[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    return outputs["labels"].to(context.device), outputs["tokens"][:, :steps].to(context.device)


def fast(gen: Generator, context: Context, weights: torch.dtype) -> Any:
    """What samples fastest there in this precision."""
    if context.device.type == "cpu":
        return PackedGenerator(gen, weights)
    return copy.deepcopy(gen).to(context.device, weights)


def reduced(context: Context) -> list[tuple[str, Callable[[Generator], tuple[Any, torch.dtype | None]], float]]:
    """Precisions of weights and cache, and the bounds on guided logits of tests/inference/test_packed_generator.py."""
    e4m3 = torch.float8_e4m3fn
    if context.device.type == "cpu":
        names = {"bfloat16": (torch.bfloat16, 2.5e-2), "int8": (torch.int8, 5e-2)}
        return [(n, lambda gen, d=d: (fast(gen, context, d), None), bound) for n, (d, bound) in names.items()]

    def quantized(gen: Generator, weights: torch.dtype) -> QuantizedGenerator:
        return QuantizedGenerator(fast(gen, context, torch.bfloat16), weights)

    return [
        ("bfloat16", lambda gen: (fast(gen, context, torch.bfloat16), None), 5e-2),
        ("int8 weights", lambda gen: (quantized(gen, torch.int8), None), 6e-2),
        ("e4m3 weights", lambda gen: (quantized(gen, e4m3), None), 0.25),
        ("e4m3 cache", lambda gen: (fast(gen, context, torch.bfloat16), e4m3), 0.12),
    ]


if __name__ == "__main__":
    items.main()
