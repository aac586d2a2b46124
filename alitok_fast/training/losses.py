"""Losses of the tokenizer, of its discriminator and of the generator, all in float32 whatever autocast says.

Each is a mean over the local batch, so that the mean over ranks of equal batches is the loss of the whole batch. The
perceptual distances are networks: models/perceptual.py. The factors are those of the published training, whose
numbers differ from the paper's text (0.1 * 0.05 where it says 0.1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from alitok_fast.config import TokenizerConfig

ADVERSARIAL_FACTOR = 0.1
"""Of both sides' adversarial losses in the published training."""
ADVERSARIAL_WEIGHT = 0.05
"""Of the reconstruction's adversarial loss in the published training, beside that factor."""


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


def adversarial_loss(
    fake: Tensor, weight: float | Tensor = ADVERSARIAL_WEIGHT, factor: float = ADVERSARIAL_FACTOR
) -> Tensor:
    """Of the reconstruction: -factor * weight * mean logit. fake: the discriminator's logits, any shape."""
    return -factor * weight * fake.float().mean()


def discriminator_loss(real: Tensor, fake: Tensor, factor: float = ADVERSARIAL_FACTOR) -> Tensor:
    """Hinge loss, factor / 2 * (mean relu(1 - real) + mean relu(1 + fake)), of logits of any shape.

    `fake` comes from reconstructions that are detached from the tokenizer.
    """
    return factor / 2 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


class MeanLogits(NamedTuple):
    """Moving averages, () float32 each, of the discriminator's mean logit of images and of reconstructions."""

    real: Tensor
    fake: Tensor

    @classmethod
    def zeros(cls, device: torch.device | str | None = None) -> MeanLogits:
        return cls(*torch.zeros(2, dtype=torch.float32, device=device))

    def updated(self, real: Tensor, fake: Tensor, decay: float = 0.999) -> MeanLogits:
        """The averages one step on; `real` and `fake` are the batch's mean logits, over all ranks."""
        return MeanLogits(
            self.real.lerp(real.detach().float(), 1 - decay), self.fake.lerp(fake.detach().float(), 1 - decay)
        )


def lecam_loss(real: Tensor, fake: Tensor, averages: MeanLogits) -> Tensor:
    """LeCam regularisation (Tseng et al. 2021): mean relu(real - average fake)^2 + mean relu(average real - fake)^2.

    real, fake: logits of any shape. The paper's form, given here, is the one whose mean over ranks is exact;
    1d-tokenizer passes each batch's mean logit instead, which this takes too.
    """
    above = F.relu(real.float() - averages.fake).square().mean()
    below = F.relu(averages.real - fake.float()).square().mean()
    return above + below


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018, equation 9, gamma = 1): half the squared norm of an image's gradient, over images.

    logits: the discriminator's of `images` (B, ...), which require gradients; those of an image's patches are added
    up. Its gradient is a second derivative. Raises ValueError where `logits` do not depend on `images`.
    """
    if not (images.requires_grad and logits.requires_grad):
        raise ValueError("images: expected a tensor that requires gradients, and logits made from it, got none")
    (gradient,) = torch.autograd.grad(logits.float().sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean() / 2


def gradients_at(layer: Tensor, *losses: Tensor) -> tuple[Tensor, ...]:
    """The gradient of each loss at one parameter; the graph is kept for the backward pass that follows."""
    return tuple(torch.autograd.grad(loss, layer, retain_graph=True)[0].detach() for loss in losses)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, largest: float = 1e4) -> Tensor:
    """How much the adversarial loss counts (Esser et al. 2021, VQGAN, equation 7), () float32 in [0, largest].

    The norm of the reconstruction loss's gradient over that of the adversarial loss's, both at the decoder's last
    layer (`gradients_at`). With several ranks, average both gradients over them first.
    """
    norms = [gradient.detach().float().norm() for gradient in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, largest)
