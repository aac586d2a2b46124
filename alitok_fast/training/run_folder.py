"""A run's folder: config.json, log.jsonl, checkpoint/state.pt (to go on from) and model/ (to use).

Every file but the log is written under a temporary name, flushed and renamed,
so that a kill or a full disk leaves the previous one whole. The log is cut
back to the checkpoint's step on resume.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from alitok_fast.storage.files import differences, read_json, write_atomically, write_json
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
            self._check_same(read_json(config_file, "a run's settings"), json.loads(json.dumps(description)))
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(config_file, description)
        if not self.state_file.exists():
            self.log_file.write_text("")

    def _check_same(self, saved: dict[str, Any], now: dict[str, Any]) -> None:
        if different := differences(saved, now, _FREE_KEYS):
            raise ValueError(f"out: expected the settings in {self.path / 'config.json'}, got {'; '.join(different)}")

    def save_state(self, state: dict[str, Any]) -> None:
        write_atomically(self.state_file, lambda file: torch.save(state, file))

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
