"""A run's folder: config.json, log.jsonl, checkpoint/state.pt (to go on from) and model/ (to use).

Every file but the log is written under a temporary name, flushed and renamed,
so that a kill or a full disk leaves the previous one whole. The log is cut
back to the checkpoint's step on resume.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from alitok_fast.checkpoint import write_atomically, write_json
from alitok_fast.training.config import TrainConfig

# These change what is written when, and nothing about the result.
_FREE_KEYS = {"log_every", "save_every"}


class RunFolder:
    """Creates the folder, or with `resume` reopens it; the settings must then be those of the run's beginning."""

    def __init__(self, path: str | Path, kind: str, train: TrainConfig, model: dict[str, Any], resume: bool) -> None:
        self.path = Path(path)
        self.state_file = self.path / "checkpoint" / "state.pt"
        self.log_file = self.path / "log.jsonl"
        self.model_folder = self.path / "model"
        description = {"kind": kind, "train": train.to_dict(), "model": model}
        config_file = self.path / "config.json"
        if self.state_file.exists() and not resume:
            raise ValueError(f"out: {self.path} already holds a run; resume it, or choose another folder")
        if resume and config_file.exists():
            self._check_same(json.loads(config_file.read_text()), json.loads(json.dumps(description)))
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(config_file, description)
        if not self.state_file.exists():
            self.log_file.write_text("")

    def _check_same(self, saved: dict[str, Any], now: dict[str, Any]) -> None:
        before, after = ({"kind": d["kind"], **d["train"], **d["model"]} for d in (saved, now))
        for key in sorted((set(before) | set(after)) - _FREE_KEYS):
            if before.get(key) != after.get(key):
                file = self.path / "config.json"
                raise ValueError(f"{key}: expected {before.get(key)!r} as in {file}, got {after.get(key)!r}")

    def save_state(self, state: dict[str, Any]) -> None:
        write_atomically(self.state_file, lambda file: torch.save(state, file))
        _sync_folder(self.state_file.parent)

    def load_state(self) -> dict[str, Any] | None:
        """The last checkpoint, its tensors on the CPU; None when there is none yet. Cuts the log back to its step."""
        if not self.state_file.exists():
            return None
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises a different type for each kind of damage
            found = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.state_file}: expected a whole checkpoint, got {found}") from error
        lines = [line for line in self.log_file.read_text().splitlines() if _log_step(line, state["step"])]
        write_atomically(self.log_file, lambda file: file.write_text("".join(line + "\n" for line in lines)))
        return state

    def log(self, entry: dict[str, Any]) -> None:
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _log_step(line: str, last: int) -> bool:
    """Whether a log line belongs to steps up to `last`; a line cut short by a kill does not."""
    try:
        return json.loads(line)["step"] <= last
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; a no-op where folders cannot be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
