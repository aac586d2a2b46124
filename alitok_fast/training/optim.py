"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from alitok_fast.training.config import TrainConfig

# Learned tokens and positions are embeddings although they are plain parameters; so is the codebook.
_EMBEDDING_WORDS = ("embedding", "latent_tokens", "codebook")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups of the trainable parameters: without, then with `weight_decay`.

    1-D parameters (biases, norms) and embeddings are not decayed. Each group
    also carries its parameters' `names`, sorted.
    """
    groups: list[dict[str, Any]] = [{"names": [], "params": [], "weight_decay": decay} for decay in (0.0, weight_decay)]
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 and not any(word in name for word in _EMBEDDING_WORDS)
            groups[decayed]["names"].append(name)
            groups[decayed]["params"].append(parameter)
    return groups


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    groups = parameter_groups(model, config.weight_decay)
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, lr: float, end_lr: float, warmup: int, total: int) -> float:
    """Linear from 0 at step 0 to `lr` at step `warmup`, then a cosine to `end_lr` at step `total`, constant after."""
    if step < warmup:
        return lr * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return end_lr + (lr - end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
