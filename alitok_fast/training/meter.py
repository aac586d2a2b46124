"""Averages over a log window, and the watch over the codebook."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from alitok_fast.evaluation.codebook import codebook_perplexity, codebook_usage
from alitok_fast.training.ranks import Ranks

_log = logging.getLogger(__name__)


class Meter:
    """Means of the logged values, the codes' usage and the speed since the last log entry.

    Sums stay on the device of the values until `summary`. Values need not be there in every step: each is the mean
    over the times that it was.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._usage: Tensor | None = None
        self._samples = 0
        self._began = time.perf_counter()

    def add(self, values: dict[str, Tensor], usage: Tensor | None, samples: int) -> None:
        """`samples` counts those of all processes."""
        for key, value in values.items():
            value = value.detach().double()
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] = self._counts.get(key, 0) + 1
        if usage is not None:
            usage = usage.detach().long()
            self._usage = usage if self._usage is None else self._usage + usage
        self._samples += samples

    def summary(self, ranks: Ranks | None = None) -> dict[str, float]:
        """Plain numbers, over all processes; `usage` is the share of codes seen, `perplexity` their effective number,
        `dead_codes` the number of those not seen."""
        ranks = ranks or Ranks()
        result = {key: float(ranks.mean(value)) / self._counts[key] for key, value in self._sums.items()}
        if self._usage is not None:
            usage = ranks.sum(self._usage)
            result["usage"] = codebook_usage(usage)
            result["perplexity"] = codebook_perplexity(usage)
            result["dead_codes"] = int((usage == 0).sum())
        result["samples_per_second"] = self._samples / (time.perf_counter() - self._began)
        return result

    def leave_out(self, seconds: float) -> None:
        """Do not count the last `seconds` in the speed."""
        self._began += seconds

    @property
    def num_codes(self) -> int:
        """Codes of the codebook whose usage is counted; 0 where none is."""
        return 0 if self._usage is None else len(self._usage)

    def state(self, ranks: Ranks | None = None) -> dict[str, Any]:
        """What has been added so far in all processes."""
        ranks = ranks or Ranks()
        return {
            "sums": {key: ranks.mean(value) for key, value in self._sums.items()},
            "counts": dict(self._counts),
            "usage": None if self._usage is None else ranks.sum(self._usage),
            "samples": self._samples,
            "seconds": time.perf_counter() - self._began,
        }

    def load(self, state: dict[str, Any], ranks: Ranks | None = None) -> None:
        """Go on from `state()`, whose tensors may lie anywhere, with the values of this process's device."""
        ranks = ranks or Ranks()
        self._sums = {key: value.to(ranks.device) for key, value in state["sums"].items()}
        self._counts = dict(state["counts"])
        usage = state["usage"]
        if usage is not None:  # a sum over the processes: one of them goes on with it
            self._usage = usage.to(ranks.device) if ranks.main else torch.zeros_like(usage, device=ranks.device)
        self._samples = state["samples"]
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
