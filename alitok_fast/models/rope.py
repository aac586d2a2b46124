"""Rotary table of the generator: condition row, 1-D prefix rows, 2-D image rows."""

from __future__ import annotations

import torch
from torch import Tensor

from alitok_fast.config import GeneratorConfig

BASE = 10000.0


def rope_table(config: GeneratorConfig) -> Tensor:
    """(1 + N, head_dim / 2, 2) float32 on the CPU (also while a model is built on "meta"), the last axis (cos, sin).

    Row 0, the condition, is all zeros: its rotated q and k are zero vectors. The prefix rows turn with their position
    over the whole head; the image rows turn the first half of the pairs with the grid row and the second half with
    the grid column, both counted on from the prefix.
    """
    dim, prefix, grid = config.head_dim, config.num_prefix_tokens, config.grid
    prefix_angles = torch.outer(torch.arange(prefix, device="cpu").float(), _frequencies(dim))
    axis_angles = torch.outer(torch.arange(prefix, prefix + grid, device="cpu").float(), _frequencies(dim // 2))
    by_row = axis_angles[:, None, :].expand(grid, grid, -1)
    by_column = axis_angles[None, :, :].expand(grid, grid, -1)
    image_angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    angles = torch.cat([prefix_angles, image_angles])
    turning = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(turning[:1]), turning])


def _frequencies(dim: int) -> Tensor:
    return 1.0 / BASE ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
