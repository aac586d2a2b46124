"""The training loop: the same for both tokenizer stages and for the generator."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from alitok_fast._library import install_hint
from alitok_fast.models.generator import Generator
from alitok_fast.models.loading import save_model
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.progress import Bar
from alitok_fast.storage.text import first_line
from alitok_fast.training.config import TrainConfig
from alitok_fast.training.interrupts import Interrupts
from alitok_fast.training.meter import CodebookWatch, Meter
from alitok_fast.training.optim import adamw, learning_rate
from alitok_fast.training.run_folder import RunFolder


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

    def batch(self, index: int) -> tuple[Tensor, ...]:
        """Micro-batch `index` of the whole run, on the CPU; a function of the index alone."""

    @property
    def loss(self) -> Callable[..., StepOutput]:
        """A method: what `batch` gives, on the device, to a StepOutput."""

    def after_backward(self, outputs: Sequence[StepOutput]) -> None:
        """Once in each step, before the optimizer: updates outside the gradient, such as the clustering of the
        codebook. `outputs` are those of all micro-batches, their losses without gradients."""

    def provenance(self) -> dict[str, Any]: ...


def train(
    task: Task,
    config: TrainConfig,
    run: RunFolder,
    device: torch.device | str = "cpu",
    tensorboard: bool = False,
    progress: bool = True,
) -> Path:
    """Train until `config.steps`, from the run's checkpoint where it has one. Returns the folder of the model.

    On a CPU in fp32, with the same number of threads, a run that was killed
    and resumed ends with the same weights, bit for bit, as one that was not.
    Raises FloatingPointError, leaving the last checkpoint, when the loss, its
    gradient or the weights are no finite numbers. After Ctrl-C the step is
    finished and saved before KeyboardInterrupt is raised.
    """
    device = torch.device(device)
    writer = _tensorboard(run.path) if tensorboard else None
    model = task.model.to(device).train()
    optimizer = adamw(model, config)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()} if config.ema_decay else None
    meter, watch = Meter(), CodebookWatch(config.warmup)
    torch.manual_seed(config.seed)
    start = _restore(run, model, optimizer, ema, meter, device)
    if start and run.model_step() != start:  # killed between the checkpoint and its model
        _save_model(run, task, model, ema, start)

    with (
        Interrupts() as interrupts,
        ThreadPoolExecutor(1) as pool,
        Bar("train", config.steps, start, progress) as bar,
    ):
        ahead = pool.submit(task.batch, start * config.grad_accumulation)
        for step in range(start, config.steps):
            lr = learning_rate(step, config.lr, config.end_lr, config.warmup, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            outputs = []
            for micro in range(config.grad_accumulation):
                batch = [part.to(device) for part in ahead.result()]
                ahead = pool.submit(task.batch, step * config.grad_accumulation + micro + 1)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    output = task.loss(*batch)
                (output.loss / config.grad_accumulation).backward()
                outputs.append(output._replace(loss=output.loss.detach()))
                meter.add(output.loss, output.values, output.usage, samples=len(batch[0]))
            task.after_backward(outputs)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            loss = float(torch.stack([output.loss for output in outputs]).mean())
            if not (math.isfinite(loss) and math.isfinite(float(norm))):
                raise _not_finite("loss", f"{loss} with gradient norm {float(norm)}", step, run)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                _update_ema(ema, model, config.ema_decay)

            done, figures = step + 1, {"loss": loss}
            if done % config.log_every == 0 or done == config.steps:
                entry = {"step": done, "lr": lr, "grad_norm": float(norm), **meter.summary()}
                run.log(entry)
                figures = {key: entry[key] for key in ("loss", "usage", "perplexity") if key in entry}
                _write_tensorboard(writer, entry)
                watch.see(done, entry, meter.num_codes)
                meter = Meter()
            if done % config.save_every == 0 or done == config.steps or interrupts.seen:
                _check_weights(model, step, run)
                run.save_state(_state(done, model, optimizer, ema, meter))
                _save_model(run, task, model, ema, done)
            bar.advance(figures)
            if interrupts.seen and done < config.steps:
                raise KeyboardInterrupt
    if writer is not None:
        writer.close()
    return run.model_folder


def _check_weights(model: nn.Module, step: int, run: RunFolder) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            wrong = value[~value.isfinite()].flatten()[0].item()
            raise _not_finite(f"weight {name}", str(wrong), step, run)


def _not_finite(what: str, value: str, step: int, run: RunFolder) -> FloatingPointError:
    kept = f"the last checkpoint is {run.state_file}" if run.state_file.exists() else "no checkpoint was written yet"
    return FloatingPointError(
        f"{what}: expected a finite number, got {value} at step {step}; {kept}. Lower lr, or use precision fp32"
    )


def _state(
    step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict | None, meter: Meter
) -> dict[str, Any]:
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema,
        "meter": meter.state(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(
    run: RunFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: dict | None,
    meter: Meter,
    device: torch.device,
) -> int:
    """Put the run's checkpoint back, random number generators included; the step to go on with, 0 without one."""
    state = run.load_state()
    if state is None:
        return 0
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            for name, value in state["ema"].items():
                ema[name].copy_(value)
        meter.load(state["meter"], device)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
    except Exception as error:  # what a checkpoint of something else lacks shows in as many types of error
        found = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{run.state_file}: expected a checkpoint of this run, got another ({found})") from error
    return state["step"]


@torch.no_grad()
def _update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)


def _save_model(
    run: RunFolder, task: Task, model: Tokenizer | Generator, ema: dict[str, Tensor] | None, step: int
) -> None:
    provenance = {**task.provenance(), "step": step, "torch": torch.__version__, "saved": time.strftime("%Y-%m-%d")}
    if ema is None:
        save_model(run.model_folder, model, provenance)
        return
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(ema)
    save_model(run.model_folder, model, {**provenance, "weights": "moving average"})
    model.load_state_dict(own)


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(f"tensorboard: asked for, but not installed; {install_hint('train')}") from error
    return SummaryWriter(folder / "tensorboard")


def _write_tensorboard(writer, entry: dict[str, Any]) -> None:
    if writer is not None:
        for key, value in entry.items():
            if key != "step":
                writer.add_scalar(key, value, entry["step"])
