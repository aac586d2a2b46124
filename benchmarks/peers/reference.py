"""The reference implementation, out of a checkout that the user points at. It is run, never copied."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alitok_fast.models import Generator, Tokenizer
from timing import Missing


class Reference:
    """Whole images by the reference's own generator and tokenizer, holding our weights.

    `autocast`: under torch.autocast to bfloat16, else float32 as published.
    """

    def __init__(self, model: Any, tokenizer: Any, gen: Generator, autocast: bool) -> None:
        self.model, self.tokenizer, self.gen, self.autocast = model, tokenizer, gen, autocast
        self.error = 5e-2 if autocast else 1e-4

    def logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        with self._precision():
            return self.model(tokens, self.gen.condition_ids(labels, len(labels))).float()

    def generate(self, labels: Tensor) -> Tensor:
        config = self.gen.config
        with self._precision():
            return self.model.generate(
                condition=labels,
                guidance_scale=config.guidance_scale,
                randomize_temperature=1.0,
                guidance_scale_pow=config.guidance_power,
                kv_cache=True,
            )

    def decode(self, tokens: Tensor) -> Tensor:
        with self._precision():
            return self.tokenizer.decode_tokens(tokens).float()

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self.gen.device.type, torch.bfloat16, enabled=self.autocast):
            yield


def load_reference(checkout: Path, size: str, gen: Generator, tokenizer: Tokenizer) -> tuple[Any, Any] | Missing:
    """The reference's generator and tokenizer on our weights and device; Missing where its requirements are not there.

    Raises ValueError where `checkout` is no such checkout or our weights do not fit.
    """
    settings = checkout / "configs" / f"alitok_{size}.yaml"
    if not settings.is_file():
        raise ValueError(f"--reference-repo: expected a checkout of the reference with {settings.name}, got {checkout}")
    sys.path.insert(0, str(checkout))
    try:
        from modeling.alitok import VAutoencoder
        from modeling.ar import ARModel
        from omegaconf import OmegaConf
    except ModuleNotFoundError as error:
        return Missing(f"the reference needs {error.name}: pip install omegaconf einops scipy")
    finally:
        sys.path.remove(str(checkout))
    model, decoder = ARModel(OmegaConf.load(settings)), VAutoencoder()
    for theirs, ours in ((model, gen), (decoder, tokenizer)):
        theirs.load_state_dict(ours.state_dict())
        theirs.to(gen.device).eval().requires_grad_(False)
    return model, decoder
