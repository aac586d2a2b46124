"""Training of the generator on a token cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alitok_fast.config import GeneratorConfig
from alitok_fast.data import DataOrder, TokenCache
from alitok_fast.models.generator import Generator
from alitok_fast.training.config import GeneratorTrainConfig
from alitok_fast.training.loop import StepOutput, train
from alitok_fast.training.losses import generator_loss
from alitok_fast.training.run_folder import open_run


class GeneratorTask:
    """Next-token cross-entropy, one random crop of each image (section 3.3). Class dropout is the model's."""

    def __init__(self, model: Generator, cache: TokenCache, config: GeneratorTrainConfig) -> None:
        self.model, self.cache, self.config = model, cache, config
        self._order = DataOrder(len(cache), config.batch_size // config.grad_accumulation, config.seed)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        pairs = self._order.at(index)
        tokens = np.stack([self.cache.sample(sample, self._order.rng(epoch, sample)) for epoch, sample in pairs])
        labels = self.cache.labels[[sample for _, sample in pairs]]
        return torch.from_numpy(tokens), torch.from_numpy(labels)

    def loss(self, tokens: Tensor, labels: Tensor) -> StepOutput:
        return StepOutput(generator_loss(self.model(tokens, labels), tokens), {})

    def after_backward(self, outputs: Sequence[StepOutput]) -> None:
        pass

    def provenance(self) -> dict[str, Any]:
        meta = self.cache.meta
        return {
            "data": meta.source,
            "images": meta.num_images,
            "crops": meta.num_crops,
            "tokenizer": meta.tokenizer or None,
            "classes": meta.class_names,
            "training": self.config.to_dict(),
        }


def train_generator(
    cache: TokenCache,
    out: str | Path,
    model_config: GeneratorConfig,
    config: GeneratorTrainConfig,
    device: str = "cpu",
    resume: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
    force: bool = False,
) -> Path:
    """Train on a token cache (alitok_fast.data.validate_token_cache); the folder of the trained model.

    Raises ValueError when the cache and the model's sizes do not fit, when the
    settings or the tokens differ from those of the run being resumed, or when
    `out` holds something else, which `force` writes over.
    """
    for name, expected, actual in (
        ("tokens", model_config.num_tokens, cache.meta.num_tokens),
        ("codebook_size", model_config.codebook_size, cache.meta.codebook_size),
    ):
        if expected != actual:
            raise ValueError(f"cache: expected {name} {expected} as in the generator's configuration, got {actual}")
    if len(cache.meta.class_names) > model_config.num_classes:
        raise ValueError(
            f"cache: expected at most {model_config.num_classes} classes, got {len(cache.meta.class_names)}"
        )
    inputs = {"data": {"name": cache.meta.source, "fingerprint": cache.fingerprint()}}
    with open_run(out, "generator", config, model_config.to_dict(), resume, inputs, force) as run:
        torch.manual_seed(config.seed)
        model = Generator(model_config)
        return train(GeneratorTask(model, cache, config), config, run, device, tensorboard, progress)
