"""What the training loop asks of a task: a model, its data, its losses, its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from alitok_fast.data import DataOrder
from alitok_fast.models.generator import Generator
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.training.online import Workplace
from alitok_fast.training.phases import Place
from alitok_fast.training.ranks import Ranks


class StepOutput(NamedTuple):
    """`loss` to differentiate; `values` to average in the log; `usage` (K,) how often each code was chosen; `kept`,
    without gradients: what the task's `after_backward` needs."""

    loss: Tensor
    values: dict[str, Tensor]
    usage: Tensor | None = None
    kept: Any = None


class Task(Protocol):
    """What is trained: a model, its data and its loss."""

    @property
    def model(self) -> Tokenizer | Generator: ...

    @property
    def discriminator(self) -> nn.Module | None:
        """Trained in turns with the model, where there is one."""

    def prepare(self, called: Callable[[nn.Module], nn.Module], ranks: Ranks) -> None:
        """Once, before anything else: `called(module)` is what `loss` must call instead of a module of its own."""

    def order(self, rank: int, world: int) -> DataOrder:
        """The samples of each micro-batch, those of one process."""

    @property
    def read(self) -> Callable[[int, int], tuple[np.ndarray | int, ...]]:
        """One sample, of an epoch and its number, in any process: picklable, a function of its arguments alone."""

    @property
    def loss(self) -> Callable[..., StepOutput]:
        """A method: a `Place` of the schedule and what `read` gives, as batches on the device, to a StepOutput."""

    def after_backward(self, outputs: Sequence[StepOutput]) -> None:
        """Once in each step, before the optimizer: updates outside the gradient, such as the clustering of the
        codebook. `outputs` are those of all micro-batches, their losses without gradients."""

    def state(self) -> dict[str, Tensor]:
        """What else a checkpoint must hold to go on."""

    def load_state(self, state: dict[str, Tensor]) -> None: ...

    def pictures(self) -> np.ndarray | None:
        """(H, W, 3) uint8: what the model can do by now, of samples that stay the same; None where it cannot show it.
        Called in the main process, or in all where the model is spread over them."""

    def evaluate(self, weights: dict[str, Tensor], place: Workplace) -> dict[str, float]:
        """Figures by name of the model with these weights, which are whole and not its own to change, on images that
        stay the same. Called in all processes, where `evaluate_every` is above 0; the main one's figures count."""

    def provenance(self) -> dict[str, Any]: ...


__all__ = ["Place", "StepOutput", "Task"]
