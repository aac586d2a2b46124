"""A run's folder: config.json, run.toml, log.jsonl, checkpoint/state.pt (to go on from) and model/ (to use).

Every file but the log is written under a temporary name, flushed and renamed,
so that a kill or a full disk leaves the previous one whole. The log is cut
back to the checkpoint's step on resume. Links under these names are replaced,
not followed. One process at a time writes into the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from alitok_fast.storage.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from alitok_fast.storage.files import differences, leftovers, locked, read_json, write_atomically, write_json
from alitok_fast.storage.text import first_line
from alitok_fast.training.config import TrainConfig
from alitok_fast.training.ranks import Ranks
from alitok_fast.training.run_config import RUN_FILE

LOCK_NAME = ".train.lock"
EVALUATED = "eval/seconds"  # in the log, of each evaluation
STATE_NAME = Path("checkpoint", "state.pt")
# These change what is written when, how long a run goes on, how it is computed, or what its data are called.
_FREE_KEYS = {"log_every", "save_every", "pictures_every", "steps", "name", "parallel", "activation_checkpointing"}
_FREE_KEYS |= {"evaluate_every", "evaluate_images"}
_FREE_KEYS |= {"compile", "perceptual_weights", "lpips_weights"}  # the networks' own fingerprints are compared
_STATE_KEYS = {"step", "model", "optimizer", "ema", "meter", "rng", "task", "scaler", "plateau", "discriminator"}
_SAFETENSORS_TEMPORARY = re.compile(r"\.tmp\w{6}")


@contextlib.contextmanager
def open_run(path: str | Path, *arguments: Any, ranks: Ranks | None = None, **options: Any) -> Iterator[RunFolder]:
    """`RunFolder(path, ...)`, held against other runs inside the block; ValueError where one writes into it.

    Of the processes of one run the main one writes, and the others read.
    """
    ranks = ranks or Ranks()
    with contextlib.ExitStack() as stack:
        run = None
        with ranks.main_first():
            if ranks.main:
                run = stack.enter_context(_writing(Path(path), *arguments, **options))
        yield run or RunFolder(path, *arguments, **{**options, "writes": False})


@contextlib.contextmanager
def _writing(path: Path, *arguments: Any, **options: Any) -> Iterator[RunFolder]:
    if path.exists() and not path.is_dir():
        raise ValueError(f"out: expected a folder, got the file {path}")
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with locked(path / LOCK_NAME):
            yield RunFolder(path, *arguments, **options)
    finally:
        for folder in made:  # a refused run leaves nothing
            with contextlib.suppress(OSError):
                folder.rmdir()


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """What config.json of a run's folder says, under "kind", "train" and "model"; None where there is no such file.

    Raises ValueError naming the file when it is damaged or no run's.
    """
    file = Path(path) / CONFIG_NAME
    if not file.exists():
        return None
    saved = read_json(file, "a run's settings")
    kinds = {"kind": str, "train": dict, "model": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(saved.get(key), kind)]:
        raise ValueError(f"{file}: expected a run's settings, got a file without {wrong[0]!r}")
    return saved


def begun_with(path: str | Path, *keys: str) -> dict[str, Any]:
    """Those fingerprints of the weights that the run in a folder began with; its checkpoint has the weights. None where
    there is no run: whether there may be one, opening it decides."""
    with contextlib.suppress(ValueError):
        inputs = (read_settings(path) or {}).get("inputs", {})
        return {key: inputs[key] for key in keys if key in inputs}
    return {}


class RunFolder:
    """Creates the folder, or with `resume` reopens it.

    Whatever decides the result must then be as at the run's beginning: `kind`, the settings `train` but for `steps`
    (which may be extended) and what is written when, the sizes `model`, and `inputs`, the fingerprints of the data and
    of the weights to start from. Raises ValueError for a difference, for a folder that holds a run when not resuming,
    and for files that no run wrote, unless `force` removes these two. Without `writes`, for the other processes of a
    run, nothing is checked or written. `run_file` is the text of run.toml (`run_config`), kept beside config.json.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        train: TrainConfig,
        model: dict[str, Any],
        resume: bool,
        inputs: dict[str, Any] | None = None,
        force: bool = False,
        writes: bool = True,
        run_file: str | None = None,
    ) -> None:
        self._writes = writes
        self._run_file = run_file
        self.path = Path(path)
        self.state_file = self.path / STATE_NAME
        self.log_file = self.path / "log.jsonl"
        self.model_folder = self.path / "model"
        self._config_file = self.path / CONFIG_NAME
        self._steps = train.steps
        description = {"kind": kind, "train": train.to_dict(), "model": model, "inputs": inputs or {}}
        self._description = json.loads(json.dumps(description))
        if not writes:
            return
        if force and not resume:
            for file in self._files():
                file.unlink(missing_ok=True)
        saved = self._check_own()
        if self.state_file.exists() and not resume:
            raise ValueError(f"out: {self.path} already holds a run; resume it, or choose another folder")
        if resume and saved is not None:
            self._check_same(saved, self._description)
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        if not self.state_file.exists():
            self._describe()
            write_atomically(self.log_file, lambda file: file.write_text(""))

    def _files(self) -> list[Path]:
        model = [self.model_folder / name for name in (CONFIG_NAME, WEIGHTS_NAME)]
        return [self._config_file, self.path / RUN_FILE, self.log_file, self.state_file, *model]

    def _describe(self) -> None:
        write_json(self._config_file, self._description)
        text = self._run_file
        if text is not None:
            write_atomically(self.path / RUN_FILE, lambda file: file.write_text(text, encoding="utf-8"))

    def _check_own(self) -> dict[str, Any] | None:
        """The settings of the run in the folder; ValueError where its files are not those of a run."""
        there = [file for file in self._files() if os.path.lexists(file)]
        if not there:
            return None
        with_force = "choose another folder, or write over it with force (--force)"
        if self._config_file not in there:
            raise ValueError(f"out: expected a new folder or a run's, got another {there[0]}; {with_force}")
        try:
            return read_settings(self.path)
        except ValueError as error:
            raise ValueError(f"out: {error}; {with_force}") from None

    def _check_same(self, saved: dict[str, Any], now: dict[str, Any]) -> None:
        if different := differences(saved, now, _FREE_KEYS):
            raise ValueError(f"out: expected the settings in {self._config_file}, got {'; '.join(different)}")

    def _remove_leftovers(self) -> None:
        """What writers that were killed left; nobody writes now, the folder is locked."""
        names = {file.name for file in self._files()}
        for folder in (self.path, self.state_file.parent, self.model_folder):
            if folder.is_dir():
                unnamed = [file for file in folder.iterdir() if _SAFETENSORS_TEMPORARY.fullmatch(file.name)]
                for file in leftovers(folder, names) + (unnamed if folder == self.model_folder else []):
                    file.unlink()

    def save_state(self, state: dict[str, Any]) -> None:
        write_atomically(self.state_file, lambda file: torch.save(state, file))

    def load_state(self) -> dict[str, Any] | None:
        """The last checkpoint, its tensors on the CPU; None when there is none yet. Cuts the log back to its step.

        Raises ValueError naming a file that is damaged, or `steps` when the run is to end before its checkpoint.
        """
        if not self.state_file.exists():
            return None
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises a different type for each kind of damage
            found = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"{self.state_file}: expected a whole checkpoint, got {found}") from error
        if not isinstance(state, dict) or not state.keys() >= _STATE_KEYS or type(state["step"]) is not int:
            raise ValueError(f"{self.state_file}: expected a run's checkpoint, got another file of torch's")
        if state["step"] > self._steps:
            raise ValueError(
                f"steps: expected at least {state['step']}, the steps of {self.state_file}, got {self._steps}"
            )
        if not self._writes:
            return state
        lines = [line for line in self._log_lines() if _log_step(line, state["step"])]
        write_atomically(self.log_file, lambda file: file.write_text("".join(line + "\n" for line in lines)))
        self._describe()  # the free settings may be new
        return state

    def _log_lines(self) -> list[str]:
        try:
            return self.log_file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.log_file}: expected a run's log, got {error}") from None

    def log(self, entry: dict[str, Any]) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(self.log_file, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def evaluated(self, step: int) -> bool:
        """Whether the log has an evaluation of the model after so many steps. Of a log that `load_state` has cut."""
        entries = (json.loads(line) for line in self._log_lines())
        return any(entry["step"] == step and EVALUATED in entry for entry in entries)

    def model_step(self) -> int | None:
        """The step that the folder of the model says it is of; None where there is no whole one."""
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            if (self.model_folder / WEIGHTS_NAME).is_file():
                return int(read_json(self.model_folder / CONFIG_NAME)["provenance"]["step"])
        return None


def _log_step(line: str, last: int) -> bool:
    """Whether a log line belongs to steps up to `last`; a line cut short by a kill does not."""
    try:
        return json.loads(line)["step"] <= last
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
