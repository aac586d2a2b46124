"""Diffusion at the same resolution: a guided step of DiT-XL/2 and the decode of latents. The report multiplies."""

from __future__ import annotations

import pytest
import torch

from peers.diffusion import GUIDANCE_SCALE, STEPS, Diffusion, Size, missing
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
    small = Size(layers=2, latent=8, channels=(32, 64))
    size = mode.pick(check=small, quick=Size(layers=4), full=Size())
    torch.manual_seed(0)
    diffusion = Diffusion(size, batch, device)
    check(diffusion, size)
    contenders = {"step": Contender(diffusion.step), "VAE decode": Contender(diffusion.decode)}
    measure(
        contenders, mode.pick(check=0, quick=1, full=6), kind="diffusion", batch=batch, steps=STEPS, layers=size.layers
    )


def check(diffusion, size):
    """A step is the guided DDIM update of both predictions; the decoder makes pixels of latents."""
    schedule, latents = diffusion.schedule, diffusion.latents.float()
    assert len(schedule.timesteps) == STEPS
    first, second = schedule.timesteps[:2]
    conditional, unconditional = (noise.float() for noise in diffusion.noise(first))
    assert not torch.equal(conditional, unconditional), "the class makes no difference"
    noise = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
    now, then = schedule.alphas_cumprod[first.cpu()], schedule.alphas_cumprod[second.cpu()]
    clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
    expected = then.sqrt() * clean + (1 - then).sqrt() * noise
    torch.testing.assert_close(diffusion.step().float(), expected, rtol=0.05, atol=0.05)
    pixels = diffusion.decode()
    scale = 2 ** (len(size.channels) - 1)
    assert pixels.shape == (len(latents), 3, scale * size.latent, scale * size.latent)
    assert pixels.isfinite().all()
