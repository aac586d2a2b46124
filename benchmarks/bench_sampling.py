"""Whole images with guidance, tokens and stage-2 decode: each precision of ours beside the peers, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.models import load_generator
from alitok_fast.testing import relative_error
from costs.cpu import cpu_step
from costs.parts import Work
from costs.reports import cpu_of
from floor import Machine, decode_floor, tokens_floor
from peers import contender
from peers.compiled import Compiled
from peers.eager import Eager
from peers.ours import AsOftenRight, Ours, tokens_per_pass
from peers.reference import Reference, load_reference
from timing import Missing

BUDGET = 12.0  # seconds of one system
FULL = {"cpu": {"b": (1, 8, 32), "l": (1, 8), "xl": (1, 8)}, "cuda": dict.fromkeys(("b", "l", "xl"), (1, 8, 64, 256))}
QUICK = {"cpu": {"b": (1, 8)}, "cuda": {"b": (1, 8, 64)}}
CHECK = dict.fromkeys(("cpu", "cuda"), {"b": (1, 3), "l": (2,), "xl": (2,)})
EIGHT_BITS = "int8, 8-bit activations"
SIMULATED_WINDOW = 8
SIMULATED = "guesses right as often as the demo's (simulated)"
MINUTES = "on a CPU this would take minutes"


@dataclass(frozen=True)
class Precision:
    """Of one system of ours: weights, what they are multiplied with, cache where it is another, tokens to images."""

    weights: torch.dtype
    images: torch.dtype
    activations: torch.dtype | None = None
    kv: torch.dtype | None = None


def precisions(device, size, batch) -> dict[str, Precision]:
    """Ours by name; the first is what others are compared with."""
    bf16, fp32, int8 = torch.bfloat16, torch.float32, torch.int8
    if device.type == "cuda":
        named = {
            "bf16": Precision(bf16, bf16),
            "bf16, fp8 KV": Precision(bf16, bf16, kv=torch.float8_e4m3fn),
            "fp32": Precision(fp32, fp32),
        }
    else:
        named = {
            "int8": Precision(int8, int8),
            EIGHT_BITS: Precision(int8, int8, activations=int8),
            "bf16": Precision(bf16, bf16),
            "fp32": Precision(fp32, fp32),
        }
    if size != "b" or batch > 1:  # a full run is long enough without
        del named["fp32"]
    return {f"alitok_fast {name}": precision for name, precision in named.items()}


def check(system, gen, tokenizer, labels):
    """Logits and pixels agree with the uncached model in float32, to rounding."""
    config = gen.config
    tokens = torch.arange(len(labels) * config.num_tokens, device=labels.device).view(len(labels), -1) * 7
    tokens %= config.codebook_size
    with torch.no_grad():
        some = tokens[:, :3]
        assert relative_error(system.logits(labels, some), gen(some, labels)) < system.error
        expected = tokenizer.decode(tokens)
    pixels = system.decode(tokens)
    assert pixels.shape == expected.shape
    deviation = (pixels.float() - expected).square().mean().sqrt() / expected.std()
    assert deviation < system.error, deviation


def peers(size, batch, gen, tokenizer, mode, device, reference_repo):
    """By name: a function that makes the system, and the precision it counts as; or why it is not there."""
    slow = device.type == "cpu" and batch > (8 if size == "b" else 1)
    systems = {}
    named = {"reference, fp32": False, "reference, bf16 autocast": True}
    if reference_repo is None:
        systems["eager fp32, restated reference"] = lambda: Eager(gen, tokenizer)
        systems |= dict.fromkeys(named, Missing("no checkout of the reference: --reference-repo PATH"))
    elif not mode.timed or mode.quick:
        systems |= dict.fromkeys(named, Missing("its models have full size only: not with --quick"))
    elif slow:
        systems |= dict.fromkeys(named, Missing(MINUTES))
    else:
        loaded = load_reference(reference_repo, size, gen, tokenizer)
        for name, autocast in named.items():
            systems[name] = loaded
            if not isinstance(loaded, Missing):
                systems[name] = lambda autocast=autocast: Reference(*loaded, gen, autocast)
    compiled = "torch.compile, bf16, static cache"
    systems[compiled] = lambda: Compiled(gen, tokenizer, batch, compiled=mode.timed)
    if mode.timed and mode.quick:
        systems[compiled] = Missing("compiling takes longer than a quick run may")
    if mode.timed and mode.quick and batch > 1:
        return dict.fromkeys(systems, Missing("with --quick at batch 1 only"))
    return dict.fromkeys(systems, Missing(MINUTES)) if slow else systems


def case(size, batch):
    return pytest.param(size, batch, id=f"{size}-{batch}")


def pytest_generate_tests(metafunc):
    option = metafunc.config.option
    table = CHECK if not option.benchmark else QUICK if option.quick else FULL
    cases = [case(size, batch) for size, batches in table[option.device.type].items() for batch in batches]
    metafunc.parametrize(("size", "batch"), cases)


@pytest.mark.quick
def bench_sampling(size, batch, generator, tokenizer, measure, mode, device, ceilings, reference_repo):
    gen = generator(size)
    labels = torch.arange(batch, device=device)
    own_precisions = precisions(device, size, batch)
    images = {own.images for own in own_precisions.values()}
    decoders = {dtype: ImageDecoder(tokenizer, dtype) for dtype in images}
    contenders = {}
    for name, own in own_precisions.items():
        given = gen, decoders[own.images], batch, own.weights, own.kv, own.activations
        system = made(partial(Ours, *given), gen, tokenizer, labels)
        if isinstance(system, Missing):
            contenders[name] = system
            continue
        contenders[name] = contender(
            system,
            labels,
            warm=None if batch <= 8 or device.type == "cuda" else system.sampling_seconds,
            own=True,
            floor=floor(system, batch, own.weights, own.images, tokenizer, ceilings) if mode.timed else None,
            predicted=predicted(gen, batch, own, ceilings) if mode.timed and device.type == "cpu" else None,
            draw=system.sampling_seconds(),
            tokens_per_pass=1.0,
        )
    if device.type == "cpu" and batch == 1:
        rate = tokens_per_pass(load_generator("demo"), SIMULATED_WINDOW)
        for name in ("int8", EIGHT_BITS):
            own = own_precisions[f"alitok_fast {name}"]
            given = gen, decoders[own.images], batch, own.weights, own.kv, own.activations
            make = partial(AsOftenRight, *given, window=SIMULATED_WINDOW, rate=rate)
            simulated = contender(made(make, gen, tokenizer, labels), labels, own=True, tokens_per_pass=rate)
            contenders[f"alitok_fast {name}, window {SIMULATED_WINDOW}, {SIMULATED}"] = simulated
    for name, make in peers(size, batch, gen, tokenizer, mode, device, reference_repo).items():
        system = make if isinstance(make, Missing) else made(make, gen, tokenizer, labels)
        if isinstance(system, Missing):
            contenders[name] = system
            continue
        contenders[name] = contender(system, labels, warm=partial(warm, system, labels), own=False)
    layers = gen.config.num_layers
    measure(contenders, mode.pick(check=0, quick=1.0, full=BUDGET), kind="image", size=size, batch=batch, layers=layers)


def made(make, gen, tokenizer, labels):
    """The system, checked; Missing where its caches do not fit beside those of the others."""
    try:
        system = make()
        check(system, gen, tokenizer, labels)
    except (MemoryError, torch.OutOfMemoryError):
        return Missing("does not fit in memory beside the others")
    return system


def warm(system, labels):
    """Peers take up to minutes: a few steps where a system can be stopped, besides what `check` has run already."""
    if isinstance(system, (Eager, Compiled)):
        system.generate(labels, steps=4)


def predicted(gen, batch, own: Precision, ceilings) -> Callable[[float], float]:
    """Seconds of all steps, without the draws and the decode, by the memory's bytes a second (benchmarks/cost.py)."""
    weights, kv, activations = (
        None if dtype is None else str(dtype).removeprefix("torch.") for dtype in (own.weights, own.kv, own.activations)
    )
    work = Work(gen.config, batch, weights, kv, activations)
    return lambda speed: work.config.num_tokens * cpu_step(work, cpu_of(ceilings.to_dict(), speed)).seconds


def floor(system, batch, weights, images, tokenizer, ceilings) -> Callable[[float], dict[str, float]]:
    """Seconds that this machine needs at least for the tokens and for the decode, by its memory's bytes a second."""
    rate = {torch.float32: ceilings.fp32_flops, torch.bfloat16: ceilings.bf16_flops, torch.int8: ceilings.int8_flops}

    def seconds(read_bytes: float) -> dict[str, float]:
        step, decode = Machine(rate[weights], read_bytes), Machine(rate[images], read_bytes)
        return {
            "tokens": tokens_floor(system.gen.config, batch, system.weight_bytes, system.kv_bytes, step),
            "stage-2 decode": decode_floor(tokenizer.config, batch, images.itemsize, decode),
        }

    return seconds
