"""The training loop: the same for both tokenizer stages and for the generator, on one process or many."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alitok_fast.data.loader import Loader, throughput_line
from alitok_fast.device import cpu_multiplies_bf16
from alitok_fast.progress import Bar
from alitok_fast.storage.checkpoint import Checkpoint, write_checkpoint
from alitok_fast.storage.text import first_line
from alitok_fast.training.config import TrainConfig
from alitok_fast.training.interrupts import Interrupts
from alitok_fast.training.layers import checkpoint_activations, layers_of
from alitok_fast.training.meter import CodebookWatch, Meter
from alitok_fast.training.optim import gradient_norms
from alitok_fast.training.part import Part
from alitok_fast.training.phases import GENERATOR_TURN, Place, Plateau
from alitok_fast.training.ranks import Ranks, parallelized, settle, without_sync
from alitok_fast.training.run_folder import RunFolder
from alitok_fast.training.state import (
    MovingAverage,
    gathered_weights,
    load_optimizer,
    load_random_state,
    load_weights,
    optimizer_state,
    random_state,
    whole_weights,
)
from alitok_fast.training.task import StepOutput, Task
from alitok_fast.training.tensorboard import Board
from alitok_fast.training.watching import Watching

__all__ = ["StepOutput", "Task", "train"]

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST_SCALE = 2.0**-10  # of fp16's loss: gradients that do not fit even so are not finite


def train(
    task: Task,
    config: TrainConfig,
    run: RunFolder,
    ranks: Ranks | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    workers: int = 0,
) -> Path:
    """Train until `config.steps`, from the run's checkpoint where it has one. Returns the folder of the model.

    `workers` processes read the data; with 0 this one does. On a CPU in fp32, with the same numbers of threads and of
    processes, a run that was killed and resumed ends with the same weights, bit for bit, as one that was not.
    Raises FloatingPointError, leaving the last checkpoint, when the loss, its gradient or the weights are no finite
    numbers. After Ctrl-C or SIGTERM the step is finished and saved before KeyboardInterrupt is raised.
    """
    ranks = ranks or Ranks()
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(Board(run.path if tensorboard and ranks.main else None))
        trainer = _Trainer(task, config, run, ranks, board)
        start = trainer.restore()
        micro = config.grad_accumulation
        order = task.order(ranks.rank, ranks.world)
        pinned = ranks.device.type == "cuda"
        loader = stack.enter_context(
            Loader(task.read, order, start * micro, config.steps * micro, workers, pin_memory=pinned)
        )
        interrupts = stack.enter_context(Interrupts())
        if trainer.watching.missed(start):
            trainer.evaluate(start, loader, interrupts)
        bar = stack.enter_context(Bar("train", config.steps, start, progress and ranks.main))
        batches = iter(loader)
        for step in range(start, config.steps):
            stopping = trainer.step(step, batches, interrupts.seen)
            bar.advance(trainer.finish(step + 1, loader, stopping))
            if trainer.watching.evaluates(step + 1) and not stopping:
                trainer.evaluate(step + 1, loader, interrupts)
            if stopping and step + 1 < config.steps:
                raise KeyboardInterrupt
        if progress and ranks.main and start < config.steps:
            print(_pace(config, start, loader), file=sys.stderr)
    return run.model_folder


def _pace(config: TrainConfig, start: int, loader: Loader) -> str:
    """Who waited for whom."""
    seconds = max(loader.seconds, 1e-9)
    return throughput_line((config.steps - start) * config.batch_size / seconds, loader.waited / seconds)


class _Trainer:
    """The state of a run between two steps."""

    def __init__(self, task: Task, config: TrainConfig, run: RunFolder, ranks: Ranks, board: Board) -> None:
        self.task, self.config, self.run, self.ranks, self.board = task, config, run, ranks, board
        self.device = ranks.device
        if ranks.main and config.precision == "bf16" and self.device.type == "cpu" and not cpu_multiplies_bf16():
            warnings.warn(
                "precision: bf16 is slow on this CPU, which has no instructions for it; use fp32", stacklevel=4
            )
        self.schedule = config.schedule
        self.plateau = Plateau(config.plateau_patience, config.plateau_factor)
        modules = {GENERATOR_TURN: task.model, "discriminator": task.discriminator}
        called = {}
        for name, module in modules.items():
            if module is not None:
                called[name] = self._called(module.to(self.device).train())
        task.prepare(lambda module: next(c for n, c in called.items() if modules[n] is module), ranks)
        self.parts = {
            name: Part(name, modules[name], call, config, self.device.type)  # type: ignore[arg-type]
            for name, call in called.items()
        }
        self.average = MovingAverage(task.model, config.ema_decay)
        self.meter, self.watch = Meter(), CodebookWatch(config.warmup)
        self.watching = Watching(task, config, run, ranks, board)
        self.norms: dict[str, float] = {}
        self._loading = 0.0, 0.0
        torch.manual_seed(config.seed + ranks.rank)

    def _called(self, module: nn.Module) -> nn.Module:
        layers = layers_of(module)
        if self.config.activation_checkpointing:
            checkpoint_activations(layers)
        if self.config.compile:
            for layer in layers or [module]:
                layer.compile()
        # A discriminator is small, and the gradients of its gradients (R1) need whole weights.
        parallel = self.config.parallel if module is self.task.model else "ddp"
        return parallelized(module, self.ranks, parallel, layers)

    def step(self, step: int, batches: Iterator[tuple[Tensor, ...]], interrupted: bool) -> bool:
        """One optimizer step; whether any process has been interrupted."""
        config, place = self.config, self.schedule.at(step)
        self.plateau.enter(place.number)
        part, outputs = self.parts[place.turn], []
        for micro in range(config.grad_accumulation):
            batch = [tensor.to(self.device, non_blocking=True) for tensor in next(batches)]
            with without_sync(part.called, micro == config.grad_accumulation - 1):
                dtype = AUTOCAST[config.precision]
                with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                    output = self.task.loss(place, *batch)
                part.scaler.scale(output.loss / config.grad_accumulation).backward()
            outputs.append(output._replace(loss=output.loss.detach()))
            values = output.values if place.turn != GENERATOR_TURN else {"loss": output.loss, **output.values}
            self.meter.add(values, output.usage, samples=len(batch[0]) * self.ranks.world)
        settle(self.task.model)
        self.task.after_backward(outputs)
        norm = part.norm()
        own = torch.stack([torch.stack([o.loss for o in outputs]).mean(), norm.new_tensor(float(interrupted))])
        loss, stopping = self.ranks.mean(own).tolist()
        self._check(loss, float(norm), place, part, step)
        done = step + 1
        if done % config.log_every in (0, config.log_every - 1) or done == config.steps:
            self.norms = self._kept_norms(part.name) | gradient_norms(part.module, part.name)
        part.update(self.schedule.lr(step) * self.plateau.scale)
        if place.turn == GENERATOR_TURN:
            self.average.update(self.task.model, step)
        self.loss, self.norm = loss, float(norm)
        return stopping > 0

    def _kept_norms(self, name: str) -> dict[str, float]:
        return {key: value for key, value in self.norms.items() if not key.startswith(f"grad_norm/{name}")}

    def _check(self, loss: float, norm: float, place: Place, part: Part, step: int) -> None:
        fitting = math.isfinite(norm) or (part.scaler.is_enabled() and part.scaler.get_scale() > _SMALLEST_SCALE)
        if not (math.isfinite(loss) and fitting):
            raise self._not_finite("loss", f"{loss} with gradient norm {norm}", step, place)

    def finish(self, done: int, loader: Loader, stopping: bool) -> dict[str, float]:
        """After step number `done`: what is logged, shown and saved; figures for the progress bar."""
        config, last = self.config, done == self.config.steps
        figures = {"loss": self.loss}
        if done % config.log_every == 0 or last:
            figures = self._log(done, loader)
        if done % config.save_every == 0 or last or stopping:
            self.save(done)
        self.watching.show(done)
        return figures

    def _log(self, done: int, loader: Loader) -> dict[str, float]:
        config, place = self.config, self.schedule.at(done - 1)
        summary = self.meter.summary(self.ranks)
        entry = {
            "step": done,
            "phase": place.number,
            "lr": self.schedule.lr(done - 1) * self.plateau.scale,
            "grad_norm": self.norm,
            **self.norms,
            **summary,
            "waited": self._waited(loader),
        }
        for name, part in self.parts.items():
            if part.scaler.is_enabled():
                entry[f"scale/{name}"] = part.scaler.get_scale()
        if "loss" in summary:
            self.plateau.see(summary["loss"], config.log_every)
        meter, self.meter = self.meter, Meter()
        if self.ranks.main:
            self.run.log(entry)
            self.board.scalars(entry)
            self.watch.see(done, entry, meter.num_codes)
        return {key: entry[key] for key in ("loss", "usage", "perplexity") if key in entry}

    def _waited(self, loader: Loader) -> float:
        """The share of the time since the last log entry in which the data were waited for."""
        before, self._loading = self._loading, (loader.waited, loader.seconds)
        return (loader.waited - before[0]) / max(loader.seconds - before[1], 1e-9)

    def evaluate(self, done: int, loader: Loader, interrupts: Interrupts) -> None:
        """Log what the model is worth after step number `done`: the moving average, where there is one.

        Interrupted, it saves the step instead and raises KeyboardInterrupt; the run that goes on evaluates then.
        """
        weights = self.average.weights() or whole_weights(self.task.model)
        seconds = self.watching.evaluate(done, weights, lambda: interrupts.seen)
        if seconds is None:
            self.save(done)
            raise KeyboardInterrupt
        self.meter.leave_out(seconds)
        loader.leave_out(seconds)

    def save(self, done: int) -> None:
        """The checkpoint, then the model as others load it."""
        model = gathered_weights(self.task.model)
        self._check_weights(model, done - 1)
        state: dict[str, Any] = {
            "step": done,
            "model": model,
            "optimizer": {name: optimizer_state(p.module, p.optimizer) for name, p in self.parts.items()},
            "discriminator": gathered_weights(self.task.discriminator) if self.task.discriminator is not None else None,
            "scaler": {name: part.scaler.state_dict() for name, part in self.parts.items()},
            "ema": self.average.weights() or None,
            "plateau": self.plateau.state(),
            "task": self.task.state(),
            "meter": self.meter.state(self.ranks),
            "norms": self.norms,
            "rng": random_state(self.ranks),
        }
        with self.ranks.main_first():
            if self.ranks.main:
                self.run.save_state(state)
                self._save_model(state["ema"] or model, done)

    def _save_model(self, weights: dict[str, Tensor], done: int) -> None:
        provenance = {
            **self.task.provenance(),
            "step": done,
            "torch": torch.__version__,
            "saved": time.strftime("%Y-%m-%d"),
            **({"weights": "moving average"} if self.config.ema_decay else {}),
        }
        write_checkpoint(self.run.model_folder, Checkpoint(self.task.model.config, weights, provenance))

    def restore(self) -> int:
        """Put the run's checkpoint back, random number generators included; the step to go on with, 0 without one."""
        state = self.run.load_state()
        if state is None:
            return 0
        try:
            load_weights(self.task.model, state["model"])
            if self.task.discriminator is not None:
                load_weights(self.task.discriminator, state["discriminator"])
            for name, part in self.parts.items():
                load_optimizer(part.module, part.optimizer, state["optimizer"][name])
                part.scaler.load_state_dict(state["scaler"][name])
            if self.config.ema_decay:
                self.average.load(state["ema"])
            self.plateau.load(state["plateau"])
            self.task.load_state(state["task"])
            self.meter.load(state["meter"], self.ranks)
            self.norms = state["norms"]
            load_random_state(state["rng"], self.ranks)
        except Exception as error:  # what a checkpoint of something else lacks shows in as many types of error
            found, file = f"{type(error).__name__}: {first_line(error)}", self.run.state_file
            raise ValueError(f"{file}: expected a checkpoint of this run, got another ({found})") from error
        if self.run.model_step() != state["step"] and self.ranks.main:  # killed between the checkpoint and its model
            self._save_model(state["ema"] or state["model"], state["step"])
        return state["step"]

    def _check_weights(self, weights: dict[str, Tensor], step: int) -> None:
        wrong = ""
        for name, value in weights.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                wrong = f"{name}: {value[~value.isfinite()].flatten()[0].item()}"
                break
        if wrong := self.ranks.from_main(wrong):
            name, _, value = wrong.partition(": ")
            raise self._not_finite(f"weight {name}", value, step, self.schedule.at(step))

    def _not_finite(self, what: str, value: str, step: int, place: Place) -> FloatingPointError:
        file = self.run.state_file
        kept = f"the last checkpoint is {file}" if file.exists() else "no checkpoint was written yet"
        turn = "" if place.turn == GENERATOR_TURN else f" ({place.turn})"
        return FloatingPointError(
            f"{what}: expected a finite number, got {value} at step {step} of phase {place.number + 1}{turn}; {kept}. "
            "Lower lr, or use precision fp32"
        )
