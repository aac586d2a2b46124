"""Reconstruction losses of the tokenizer.

Perceptual and adversarial terms belong here too: each is one more entry of
the dictionary that the trainer sums (training/tokenizer.py).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from alitok_fast.config import TokenizerConfig


def reconstruction_loss(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean squared error in float32; both (B, 3, H, W) in [0, 1]."""
    return F.mse_loss(reconstruction.float(), images.float())


def auxiliary_loss(target: Tensor, aux: Tensor, config: TokenizerConfig, weight: float) -> Tensor:
    """weight * prefix tokens / image tokens * MSE on the auxiliary strip (section 3.2)."""
    return weight * config.num_prefix_tokens / config.num_image_tokens * F.mse_loss(aux.float(), target.float())


def generator_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats per token; logits (B, N + 1, K), tokens (B, N). The last position predicts nothing."""
    length = tokens.shape[1]
    return F.cross_entropy(logits[:, :length].float().flatten(0, 1), tokens.flatten())
