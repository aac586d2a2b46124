"""A checkpoint's contents, the same whether one process trained or many, with copies or with parts of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from alitok_fast.models.spread import assign, whole
from alitok_fast.training.ranks import Ranks

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_GIVEN = StateDictOptions(full_state_dict=True)


def gathered_weights(module: nn.Module) -> dict[str, Any]:
    """All weights by name, on the CPU; nothing in processes other than the main one."""
    return get_model_state_dict(module, options=_GATHERED)


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """All weights by name, on the CPU, in every process."""
    return {name: whole(value.detach()).cpu() for name, value in module.state_dict().items()}


def load_weights(module: nn.Module, weights: dict[str, Any]) -> None:
    set_model_state_dict(module, weights, options=_GIVEN)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """By the parameters' names, so that it fits however the model is spread."""
    return get_optimizer_state_dict(module, optimizer, options=_GATHERED)


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    set_optimizer_state_dict(module, optimizer, state, options=_GIVEN)


def random_state(ranks: Ranks) -> list[dict[str, Any]]:
    """Of each process: torch's random number generators, the CPU's and the GPU's."""
    own: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return ranks.gathered(own)


def load_random_state(states: list[dict[str, Any]], ranks: Ranks) -> None:
    """Where there are more processes than the checkpoint knows, the others go on with their own seeds."""
    if not isinstance(states, list):
        raise TypeError("rng: expected a list")
    if ranks.rank >= len(states):
        return
    torch.set_rng_state(states[ranks.rank]["cpu"])
    if ranks.device.type == "cuda" and "cuda" in states[ranks.rank]:
        torch.cuda.set_rng_state(states[ranks.rank]["cuda"], ranks.device)


class MovingAverage:
    """An exponential moving average of a model's weights and buffers; of its own part where the model is spread.

    The decay begins low, as (1 + step) / (10 + step), so that the average of a short run is not that of its beginning.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._values = {name: value.detach().clone() for name, value in module.state_dict().items()} if decay else {}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """With the weights after `step`, counted from 0."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self._values[name].lerp_(value, 1 - decay)
            else:
                self._values[name].copy_(value)

    def weights(self) -> dict[str, Tensor]:
        """Put together, on the CPU."""
        return {name: whole(value).cpu() for name, value in self._values.items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        if weights.keys() != self._values.keys():
            raise ValueError("ema: expected the averages of this model's weights, got others")
        for name, value in weights.items():
            assign(self._values[name], value.to(self._values[name].device))
