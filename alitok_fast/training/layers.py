"""The repeated layers of a model, which are compiled, recomputed and spread one by one."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def layers_of(module: nn.Module) -> list[nn.Module]:
    """All transformer layers of a tokenizer or a generator, all blocks of a discriminator, in order."""
    return [
        layer
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and name.rpartition(".")[2] in ("transformer", "blocks")
        for layer in child
    ]


def checkpoint_activations(layers: list[nn.Module]) -> None:
    """Keep only the inputs of these layers for the backward pass, which computes the rest again."""
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
