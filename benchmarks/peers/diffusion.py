"""Diffusion at the same resolution with diffusers' DiT (arXiv 2212.09748): of 250 guided steps, and of one pass.

The weights are random: speed does not depend on them. All of the 250 steps do the same work, so a report multiplies
one. Each of diffusers' blocks embeds timestep and class by itself, so the models have 11 to 13% more parameters than
published; these are multiplied once a row, not for each of its 256 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alitok_fast._library import install_hint
from timing import Missing

STEPS = 250
"""Of DiT-XL/2's published results, and of LightningDiT-XL's (arXiv 2501.01423: 675 M parameters, as many tokens)."""
GUIDANCE_SCALE = 1.5
CLASSES = 1000
LATENT_CHANNELS = 4
NOISIEST = 999
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A DiT with patches of 2x2 latents; 32x32 latents are 256x256 pixels."""

    layers: int
    heads: int
    head_dim: int
    latent: int = 32


GUIDED = "DiT-XL/2"
"""The one whose published results take 250 steps."""
SIZES = {"DiT-B/2": Size(layers=12, heads=12, head_dim=64), GUIDED: Size(layers=28, heads=16, head_dim=72)}


class Dit:
    """A transformer and a batch of noise for it. As a one-step generator it needs nothing else."""

    def __init__(self, size: Size, batch: int, device: torch.device) -> None:
        from diffusers import DiTTransformer2DModel

        with device:  # weights are drawn there
            transformer = DiTTransformer2DModel(
                num_attention_heads=size.heads,
                attention_head_dim=size.head_dim,
                in_channels=LATENT_CHANNELS,
                out_channels=2 * LATENT_CHANNELS,
                num_layers=size.layers,
                attention_bias=True,
                sample_size=size.latent,
                patch_size=2,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=CLASSES,
                norm_type="ada_norm_zero",
                norm_elementwise_affine=False,
            )
        self.transformer = _to_run(transformer, device)
        self.latents = torch.randn(batch, LATENT_CHANNELS, size.latent, size.latent, device=device, dtype=DTYPE)
        self.labels = torch.arange(batch, device=device) % CLASSES
        self.noisiest = torch.tensor(NOISIEST, device=device)

    @torch.no_grad()
    def predict(self, rows: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """The prediction for each row, of the rows' shape."""
        out = self.transformer(rows, timestep=timestep.expand(len(rows)), class_labels=labels).sample
        return out[:, :LATENT_CHANNELS]  # the other half is the learned variance

    def one_step(self) -> Tensor:
        """The latents after one pass, a row for each image: guidance is trained in, and its scale, if it is told at
        all, is embedded as the timestep is here. W-Flow (arXiv 2605.11755) takes the output itself for the latents;
        what predicts a velocity adds it to the noise, as is done here."""
        return self.latents + self.predict(self.latents, self.noisiest, self.labels)


class Diffusion:
    """Steps of a DiT's batch with guidance, two rows for each image."""

    def __init__(self, dit: Dit) -> None:
        from diffusers import DDIMScheduler

        device = dit.latents.device
        self.dit = dit
        self.schedule = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
        self.schedule.set_timesteps(STEPS, device=device)
        self.labels = torch.cat([dit.labels, torch.full_like(dit.labels, CLASSES)])  # the last embedding: no class

    def noise(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional prediction, both rows of each image in one pass."""
        rows = self.dit.latents.repeat(2, 1, 1, 1)
        conditional, unconditional = self.dit.predict(rows, timestep, self.labels).chunk(2)
        return conditional, unconditional

    @torch.no_grad()
    def step(self, index: int = 0) -> Tensor:
        """The latents after one guided step."""
        timestep = self.schedule.timesteps[index]
        conditional, unconditional = self.noise(timestep)
        guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        return self.schedule.step(guided, timestep, self.dit.latents).prev_sample


class Autoencoder:
    """The decoder of Stable Diffusion's autoencoder, which is W-Flow's too."""

    def __init__(self, device: torch.device, channels: tuple[int, ...] = (128, 256, 512, 512)) -> None:
        from diffusers import AutoencoderKL

        blocks = len(channels)
        with device:
            autoencoder = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * blocks,
                up_block_types=("UpDecoderBlock2D",) * blocks,
                block_out_channels=channels,
                layers_per_block=2,
                latent_channels=LATENT_CHANNELS,
            )
        autoencoder.encoder = None  # decoding alone is timed
        self.model = _to_run(autoencoder, device)
        self.scale = 2 ** (blocks - 1)
        """Pixels of a latent, in each direction."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) of latents (B, 4, H / scale, W / scale)."""
        return self.model.decode(latents / 0.18215).sample


def _to_run(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device, DTYPE).eval().requires_grad_(False)


def missing() -> Missing | None:
    """Why diffusers cannot be used, if it cannot."""
    try:
        from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel  # noqa: F401
    except (ImportError, RuntimeError) as error:  # or its torchvision does not fit torch
        return Missing(f"diffusers: {install_hint('bench')} ({error})")
    return None
