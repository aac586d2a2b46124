"""The discriminator's side of a tokenizer's training, and what it adds to the tokenizer's own loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from alitok_fast.models.discriminator import Discriminator
from alitok_fast.training.config import TokenizerTrainConfig
from alitok_fast.training.losses import (
    MeanLogits,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
    gradients_at,
    lecam_loss,
    r1_penalty,
)
from alitok_fast.training.ranks import Ranks


class Adversary:
    """A patch discriminator with its hinge loss (section 3.2), and R1 or LeCam where the settings weigh them."""

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.config, self.module = config, Discriminator()
        self.averages = MeanLogits.zeros()
        self.called: nn.Module = self.module
        self.ranks = Ranks()

    def prepare(self, called: Callable[[nn.Module], nn.Module], ranks: Ranks) -> None:
        self.called, self.ranks = called(self.module), ranks
        self.averages = MeanLogits.zeros(ranks.device)

    def generator_terms(self, fake: Tensor, rest: Tensor, last_layer: Tensor, weight: float) -> dict[str, Tensor]:
        """What the tokenizer's reconstruction (B, 3, H, W) adds to the `rest` of its loss, and figures for the log.

        With adaptive weights, `weight` is multiplied by the ratio of the gradients' norms at `last_layer`: the gradient
        that comes to it from here is then `weight` times as large as that of the rest, if far above 1e-4 by itself.
        """
        self.module.requires_grad_(False)
        try:
            logits = self.module(fake)
        finally:
            self.module.requires_grad_(True)
        if not self.config.adaptive_adversarial:
            return {"adversarial": adversarial_loss(logits, weight)}
        plain = adversarial_loss(logits, 1.0, 1.0)
        own, added = (self.ranks.mean(gradient) for gradient in gradients_at(last_layer, rest, plain))
        ratio = adaptive_weight(own, added)
        return {"adversarial": weight * ratio * plain, "adaptive_weight": ratio}

    def discriminator_terms(self, images: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss for images and reconstructions (B, 3, H, W), and figures for the log."""
        kind = images.device.type
        reduced = torch.is_autocast_enabled(kind) and not self.config.r1  # second derivatives need float32
        with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=reduced):
            if self.config.r1:
                images = images.requires_grad_(True)
            real_logits, fake_logits = self.called(torch.cat([images, fake.to(images.dtype)])).float().chunk(2)
        loss = discriminator_loss(real_logits, fake_logits)
        terms = {"discriminator": loss, "logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
        if self.config.r1:
            terms["r1"] = self.config.r1 * r1_penalty(real_logits, images)
            loss = loss + terms["r1"]
        if self.config.lecam:
            real, fake = (self.ranks.mean(logits.detach().mean()) for logits in (real_logits, fake_logits))
            self.averages = self.averages.updated(real, fake)
            terms["lecam"] = self.config.lecam * lecam_loss(real_logits, fake_logits, self.averages)
            loss = loss + terms["lecam"]
        return loss, terms

    def state(self) -> dict[str, Tensor]:
        return self.averages._asdict()

    def load_state(self, state: dict[str, Tensor]) -> None:
        device = self.averages.real.device
        self.averages = MeanLogits(state["real"].to(device), state["fake"].to(device))
