"""Averages over a log window, and the watch over the codebook."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from alitok_fast.evaluation.codebook import codebook_perplexity, codebook_usage

_log = logging.getLogger(__name__)


class Meter:
    """Means of the logged values, the codes' usage and the speed since the last log entry.

    Sums stay on the device of the values until `summary`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._usage: Tensor | None = None
        self._count = 0
        self._samples = 0
        self._began = time.perf_counter()

    def add(self, loss: Tensor, values: dict[str, Tensor], usage: Tensor | None, samples: int) -> None:
        for key, value in {"loss": loss, **values}.items():
            value = value.detach().double()
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        if usage is not None:
            usage = usage.detach().long()
            self._usage = usage if self._usage is None else self._usage + usage
        self._count += 1
        self._samples += samples

    def summary(self) -> dict[str, float]:
        """Plain numbers; `usage` is the share of codes seen, `perplexity` their effective number."""
        result = {key: float(value) / self._count for key, value in self._sums.items()}
        if self._usage is not None:
            result["usage"] = codebook_usage(self._usage)
            result["perplexity"] = codebook_perplexity(self._usage)
        result["samples_per_second"] = self._samples / (time.perf_counter() - self._began)
        return result

    @property
    def num_codes(self) -> int:
        """Codes of the codebook whose usage is counted; 0 where none is."""
        return 0 if self._usage is None else len(self._usage)

    def state(self) -> dict[str, Any]:
        return {
            "sums": self._sums,
            "usage": self._usage,
            "count": self._count,
            "samples": self._samples,
            "seconds": time.perf_counter() - self._began,
        }

    def load(self, state: dict[str, Any], device: torch.device | str) -> None:
        """Go on from `state()`, whose tensors may lie anywhere, with values that come from `device`."""
        self._sums = {key: value.to(device) for key, value in state["sums"].items()}
        self._usage = None if state["usage"] is None else state["usage"].to(device)
        self._count, self._samples = state["count"], state["samples"]
        self._began = time.perf_counter() - state["seconds"]


class CodebookWatch:
    """Says once in words that the codebook has collapsed: after the warm-up few codes stand for everything."""

    SHARE = 0.05

    def __init__(self, warmup: int) -> None:
        self._warmup, self._said = warmup, False

    def see(self, step: int, entry: dict[str, Any], num_codes: int) -> None:
        """`entry` is a log entry, `num_codes` the size of the codebook (0 where there is none)."""
        if self._said or step <= self._warmup or not num_codes or entry["perplexity"] >= self.SHARE * num_codes:
            return
        self._said = True
        _log.warning(
            "codebook: collapsed at step %d: its perplexity is %.1f, as if %.0f of its %d codes were used, so tokens "
            "say little about a picture. Lower lr, or warm up for longer",
            step, entry["perplexity"], max(1, entry["perplexity"]), num_codes,
        )  # fmt: skip
