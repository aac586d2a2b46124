"""One of the modules that a run trains, with its optimizer: the model, or its discriminator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alitok_fast.models.spread import whole
from alitok_fast.training.config import TrainConfig
from alitok_fast.training.optim import adamw


class Part:
    """A module that is trained: what is called instead of it, its optimizer and, in fp16, the scale of its loss."""

    def __init__(self, name: str, module: nn.Module, called: nn.Module, config: TrainConfig, device: str) -> None:
        self.name, self.module, self.called = name, module, called
        self.optimizer = adamw(module, config)
        self.scaler = torch.amp.GradScaler(device, enabled=config.precision == "fp16")
        self._largest = config.max_grad_norm

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def norm(self) -> Tensor:
        """Of the whole gradient, unscaled; clips it where the settings say so."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._largest:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), self._largest, norm)
        return whole(norm)

    def update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
