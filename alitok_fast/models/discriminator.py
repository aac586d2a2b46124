"""Patch discriminator of the tokenizer's adversarial phase (specification, stage-1 training)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alitok_fast.models.layers import Conv2d

SLOPE = 0.1
PATCHES = 16


class BlurDownsample(nn.Module):
    """Halves height and width with the binomial filter (1, 3, 3, 1) on each axis."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float32)
        kernel = torch.outer(taps, taps)
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, -1, -1, -1), stride=2, padding=1, groups=channels)


class Discriminator(nn.Module):
    """images (B, 3, H, W) -> logits (B, 1, 16, 16), high where a patch looks real."""

    def __init__(self, channels: int = 128, stages: int = 3) -> None:
        super().__init__()
        self.block_in = nn.Sequential(Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(SLOPE))
        widths = [channels] + [channels << stage for stage in range(stages)]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                Conv2d(narrow, wide, 3, padding=1),
                BlurDownsample(),
                nn.GroupNorm(32, wide, dtype=torch.float32),
                nn.LeakyReLU(SLOPE),
            )
            for narrow, wide in zip(widths[:-1], widths[1:], strict=True)
        )
        self.to_logits = nn.Sequential(
            Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(SLOPE), Conv2d(widths[-1], 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.block_in(images)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(F.adaptive_max_pool2d(x, PATCHES))
