"""Averages over a log window."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from alitok_fast.evaluation.codebook import codebook_perplexity, codebook_usage


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
