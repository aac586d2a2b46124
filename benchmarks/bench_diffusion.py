"""Diffusion at the same resolution: a guided step of DiT-XL/2, the pass of one-step generators, the decode of latents.

A report multiplies and adds them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from peers.diffusion import GUIDANCE_SCALE, GUIDED, NOISIEST, SIZES, STEPS, Autoencoder, Diffusion, Dit, missing
from timing import Contender, Missing

FULL = {"cpu": (1, 8), "cuda": (1, 8, 64)}


def pytest_generate_tests(metafunc):
    option = metafunc.config.option
    full = option.benchmark and not option.quick
    metafunc.parametrize("batch", FULL[option.device.type] if full else (1,))


def bench_diffusion(batch, measure, mode, device):
    reason = missing()
    if isinstance(reason, Missing):
        pytest.skip(reason.reason)
    cut = mode.pick(check={"layers": 2, "latent": 8}, quick={"layers": 4}, full={})
    sizes = {name: replace(size, **cut) for name, size in SIZES.items()}
    torch.manual_seed(0)
    dits = {name: Dit(size, batch, device) for name, size in sizes.items()}
    diffusion = Diffusion(dits[GUIDED])
    autoencoder = Autoencoder(device, **mode.pick(check={"channels": (32, 64)}, quick={}, full={}))
    check_guided(diffusion)
    contenders = {"step": Contender(diffusion.step)}
    for name, dit in dits.items():
        check_one_step(dit, autoencoder)
        facts = {"model": name, "layers": sizes[name].layers, "steps": 1}
        contenders[f"{name}, one step"] = Contender(dit.one_step, facts=facts)
    contenders["VAE decode"] = Contender(partial(autoencoder.decode, dits[GUIDED].latents))
    budget, layers = mode.pick(check=0, quick=1, full=6), sizes[GUIDED].layers
    measure(contenders, budget, kind="diffusion", batch=batch, steps=STEPS, layers=layers)


def check_guided(diffusion):
    """A step is the guided DDIM update of both predictions."""
    schedule, latents = diffusion.schedule, diffusion.dit.latents.float()
    assert len(schedule.timesteps) == STEPS
    first, second = schedule.timesteps[:2]
    conditional, unconditional = (noise.float() for noise in diffusion.noise(first))
    assert not torch.equal(conditional, unconditional), "the class makes no difference"
    noise = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
    now, then = schedule.alphas_cumprod[first.cpu()], schedule.alphas_cumprod[second.cpu()]
    clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
    expected = then.sqrt() * clean + (1 - then).sqrt() * noise
    torch.testing.assert_close(diffusion.step().float(), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def check_one_step(dit, autoencoder):
    """One pass of the transformer, a row for each image, is added to the noise; the decoder makes pixels of latents."""
    batch, _, height, width = dit.latents.shape
    rows = []
    hook = dit.transformer.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    latents = dit.one_step()
    hook.remove()
    assert rows == [batch], "expected one pass without rows for guidance"
    timesteps = torch.full((batch,), NOISIEST, device=dit.labels.device)
    velocity = dit.transformer(dit.latents, timestep=timesteps, class_labels=dit.labels).sample.chunk(2, 1)[0]
    torch.testing.assert_close(latents, dit.latents + velocity)
    assert not torch.equal(latents, dit.latents), "the transformer makes no difference"
    pixels = autoencoder.decode(latents)
    assert pixels.shape == (batch, 3, autoencoder.scale * height, autoencoder.scale * width)
    assert pixels.isfinite().all()
