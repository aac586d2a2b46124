"""Parameter groups, the optimizer, and the norms of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alitok_fast.models.spread import whole
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
    """Over the trainable parameters. `config.weight_decay_on` "all" decays biases, norms and embeddings too."""
    groups = parameter_groups(model, config.weight_decay)
    if config.weight_decay_on == "all":
        groups[0]["weight_decay"] = config.weight_decay
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def gradient_norms(module: nn.Module, prefix: str) -> dict[str, float]:
    """The norm of the gradient of each part of a module (encoder, quantize, blocks, ...), for the log."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(name.partition(".")[0], []).append(parameter.grad)
    norms = {name: float(whole(torch.nn.utils.get_total_norm(gradients))) for name, gradients in parts.items()}
    return {f"grad_norm/{prefix}.{name}": norm for name, norm in norms.items()}
