"""The perceptual terms of a tokenizer's loss: the frozen networks that the phases of a run need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alitok_fast.models.perceptual import logit_distance, lpips_distance
from alitok_fast.storage.files import weights_fingerprint
from alitok_fast.training.config import TokenizerTrainConfig
from alitok_fast.training.phases import Phase


class Distances:
    """Made before anything is trained, so that a missing file or library ends the run at once."""

    def __init__(self, config: TokenizerTrainConfig) -> None:
        phases = config.schedule.phases
        self._networks: dict[str, nn.Module] = {}
        if any(phase.perceptual for phase in phases):
            self._networks["perceptual"] = logit_distance(config.perceptual_network, config.perceptual_weights or None)
        if any(phase.lpips for phase in phases):
            self._networks["lpips"] = lpips_distance(config.lpips_network, config.lpips_weights or None)

    def to(self, device: torch.device) -> None:
        for network in self._networks.values():
            network.to(device)

    def __call__(self, phase: Phase, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """The terms that the phase weighs, weighted; both pictures (B, 3, H, W) in [0, 1]."""
        weights = {"perceptual": phase.perceptual, "lpips": phase.lpips}
        return {
            name: weight * self._networks[name](images, reconstruction).mean()
            for name, weight in weights.items()
            if weight
        }

    def fingerprints(self) -> dict[str, str]:
        """Of the networks' weights."""
        return {name: weights_fingerprint(network.state_dict()) for name, network in self._networks.items()}
