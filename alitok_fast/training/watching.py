"""What a run shows of its model beside the losses: pictures, and its evaluation. Neither changes what is trained."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from alitok_fast.storage.images import write_image
from alitok_fast.training.config import TrainConfig
from alitok_fast.training.online import EvaluationStopped, Workplace
from alitok_fast.training.ranks import Ranks
from alitok_fast.training.run_folder import EVALUATED, RunFolder
from alitok_fast.training.task import Task
from alitok_fast.training.tensorboard import Board


class Watching:
    """Pictures and evaluations of a task's model, after some of its steps."""

    def __init__(self, task: Task, config: TrainConfig, run: RunFolder, ranks: Ranks, board: Board) -> None:
        self.task, self.config, self.run, self.ranks, self.board = task, config, run, ranks, board

    def show(self, done: int) -> None:
        """Write the task's picture after step number `done`, where it is due."""
        spread = self.ranks.world > 1 and self.config.parallel == "fsdp"
        if not self._due(done, self.config.pictures_every) or not (self.ranks.main or spread):
            return
        with self._own_noise(), torch.no_grad():
            self.task.model.eval()
            picture = self.task.pictures()
            self.task.model.train()
        if picture is None or not self.ranks.main:
            return
        folder = self.run.path / "pictures"
        folder.mkdir(exist_ok=True)
        write_image(folder / f"step_{done:07d}.png", picture)
        self.board.picture(picture, done)

    def evaluates(self, done: int) -> bool:
        return self._due(done, self.config.evaluate_every)

    def missed(self, done: int) -> bool:
        """Whether a run that goes on from step number `done` was killed before the evaluation that was due there."""
        if not (done and self.evaluates(done)):
            return False
        return bool(self.ranks.from_main(self.ranks.main and not self.run.evaluated(done)))

    def evaluate(self, done: int, weights: dict[str, Tensor], stop: Callable[[], bool]) -> float | None:
        """Log what the model with these weights is worth; the seconds that it took, None where `stop` ended it."""
        began = time.perf_counter()
        place = Workplace(self.run.path / "evaluation", self.ranks, stop)
        try:
            with self._own_noise():
                figures = self.task.evaluate(weights, place)
        except EvaluationStopped:
            return None
        seconds = time.perf_counter() - began
        if self.ranks.main:
            entry = {"step": done, **{f"eval/{name}": value for name, value in figures.items()}, EVALUATED: seconds}
            self.run.log(entry)
            self.board.scalars(entry)
        return seconds

    def _due(self, done: int, every: int) -> bool:
        return every > 0 and (done % every == 0 or done == self.config.steps)

    @contextlib.contextmanager
    def _own_noise(self) -> Iterator[None]:
        device = self.ranks.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
