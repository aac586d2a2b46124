"""TensorBoard files of a run, where they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from alitok_fast._library import install_hint


class Board:
    """Writes into `folder`/tensorboard; nothing where `folder` is None. Raises RuntimeError if it is not installed."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                hint = install_hint("train")
                raise RuntimeError(f"tensorboard: asked for, but not installed; {hint}") from error
            self._writer = SummaryWriter(folder / "tensorboard")

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def scalars(self, entry: dict[str, Any]) -> None:
        """All figures of a log entry, at its "step"."""
        if self._writer is not None:
            for key, value in entry.items():
                if key != "step":
                    self._writer.add_scalar(key, value, entry["step"])

    def picture(self, picture: np.ndarray, step: int) -> None:
        """(H, W, 3) uint8."""
        if self._writer is not None:
            self._writer.add_image("pictures", picture, step, dataformats="HWC")
            self._writer.flush()
