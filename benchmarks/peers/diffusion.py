"""Diffusion at the same resolution: DiT-XL/2 (arXiv 2212.09748) from diffusers, with random weights.

Speed does not depend on the weights. Every one of its 250 steps does the same work, so a report multiplies one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alitok_fast._library import install_hint
from timing import Missing

STEPS = 250
"""Of DiT-XL/2's published results, and of LightningDiT-XL's (arXiv 2501.01423: 675 M parameters, as many tokens)."""
GUIDANCE_SCALE = 1.5
CLASSES = 1000


@dataclass(frozen=True)
class Size:
    """Published: DiT-XL/2-256 and the decoder of Stable Diffusion's autoencoder."""

    layers: int = 28
    latent: int = 32
    channels: tuple[int, ...] = (128, 256, 512, 512)


class Diffusion:
    """Steps and decoding of one batch, in bfloat16."""

    def __init__(self, size: Size, batch: int, device: torch.device) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

        dtype = torch.bfloat16
        blocks = len(size.channels)
        with device:  # weights are drawn there
            self.transformer = DiTTransformer2DModel(
                num_attention_heads=16,
                attention_head_dim=72,
                in_channels=4,
                out_channels=8,
                num_layers=size.layers,
                attention_bias=True,
                sample_size=size.latent,
                patch_size=2,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=CLASSES,
                norm_type="ada_norm_zero",
                norm_elementwise_affine=False,
            )
            self.autoencoder = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * blocks,
                up_block_types=("UpDecoderBlock2D",) * blocks,
                block_out_channels=size.channels,
                layers_per_block=2,
                latent_channels=4,
                sample_size=8 * size.latent,
            )
        self.autoencoder.encoder = None  # decoding alone is timed
        for model in (self.transformer, self.autoencoder):
            model.to(device, dtype).eval().requires_grad_(False)
        self.schedule = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
        self.schedule.set_timesteps(STEPS, device=device)
        self.latents = torch.randn(batch, 4, size.latent, size.latent, device=device, dtype=dtype)
        labels = torch.arange(batch, device=device) % CLASSES
        self.labels = torch.cat([labels, torch.full_like(labels, CLASSES)])  # the last embedding: no class

    @torch.no_grad()
    def noise(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional prediction, both rows of each image in one pass."""
        rows = self.latents.repeat(2, 1, 1, 1)
        out = self.transformer(rows, timestep=timestep.expand(len(rows)), class_labels=self.labels).sample
        conditional, unconditional = out[:, :4].chunk(2)  # the other half is the learned variance
        return conditional, unconditional

    @torch.no_grad()
    def step(self, index: int = 0) -> Tensor:
        """The latents after one guided step."""
        timestep = self.schedule.timesteps[index]
        conditional, unconditional = self.noise(timestep)
        guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        return self.schedule.step(guided, timestep, self.latents).prev_sample

    @torch.no_grad()
    def decode(self) -> Tensor:
        """(B, 3, 8 * latent, 8 * latent)."""
        return self.autoencoder.decode(self.latents / 0.18215).sample


def missing() -> Missing | None:
    """Why diffusers cannot be used, if it cannot."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        return Missing(f"diffusers: {install_hint('bench')} ({error})")
    return None
