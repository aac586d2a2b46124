"""Training of the generator on a token cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alitok_fast.config import GeneratorConfig
from alitok_fast.data import DataOrder, TokenCache
from alitok_fast.data.checks import require_count
from alitok_fast.inference.sampler import sample
from alitok_fast.models.generator import Generator
from alitok_fast.models.loading import load_generator, load_tokenizer
from alitok_fast.models.tokenizer import Tokenizer, encoder_fingerprint
from alitok_fast.storage.checkpoint import Checkpoint
from alitok_fast.storage.files import weights_fingerprint
from alitok_fast.storage.images import grid, to_uint8
from alitok_fast.training.config import GeneratorTrainConfig, check_share
from alitok_fast.training.loop import train
from alitok_fast.training.losses import generator_loss
from alitok_fast.training.online import SampleEvaluation, Workplace
from alitok_fast.training.phases import Place
from alitok_fast.training.ranks import Ranks, joined
from alitok_fast.training.run_folder import begun_with, open_run
from alitok_fast.training.task import StepOutput


@dataclass(frozen=True)
class CachedTokens:
    """What reads the cache: the tokens (N,) of one crop of an image, and its label."""

    cache: TokenCache
    seed: int

    def __call__(self, epoch: int, sample: int) -> tuple[np.ndarray, int]:
        rng = DataOrder(len(self.cache), 1, self.seed).rng(epoch, sample)
        return self.cache.sample(sample, rng), int(self.cache.labels[sample])


class GeneratorTask:
    """Next-token cross-entropy, one random crop of each image (section 3.3). Class dropout is the model's.

    With a `tokenizer`, pictures are sampled while training; `evaluation` is needed where `evaluate_every` is above 0.
    """

    discriminator = None

    def __init__(
        self,
        model: Generator,
        cache: TokenCache,
        config: GeneratorTrainConfig,
        tokenizer: Tokenizer | None = None,
        evaluation: SampleEvaluation | None = None,
    ) -> None:
        self.model, self.cache, self.config, self.tokenizer = model, cache, config, tokenizer
        self.evaluation = evaluation
        self._called: nn.Module = model
        self._spread = False

    def prepare(self, called: Callable[[nn.Module], nn.Module], ranks: Ranks) -> None:
        self._called = called(self.model)
        self._spread = ranks.world > 1 and self.config.parallel == "fsdp"
        if self.tokenizer is not None:
            self.tokenizer.to(ranks.device).eval()

    def order(self, rank: int = 0, world: int = 1) -> DataOrder:
        config = self.config
        return DataOrder(len(self.cache), config.batch_size // config.grad_accumulation, config.seed, rank, world)

    @property
    def read(self) -> CachedTokens:
        return CachedTokens(self.cache, self.config.seed)

    def loss(self, place: Place, tokens: Tensor, labels: Tensor) -> StepOutput:
        """`tokens` (B, N) and `labels` (B,), int64. The log has the share of tokens that are the likeliest, too."""
        logits = self._called(tokens, labels)
        loss = generator_loss(logits, tokens)
        with torch.no_grad():
            accuracy = (logits[:, : tokens.shape[1]].argmax(-1) == tokens).float().mean()
        return StepOutput(loss, {"accuracy": accuracy})

    def after_backward(self, outputs: Sequence[StepOutput]) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass

    def pictures(self) -> np.ndarray | None:
        """Eight samples, of as many classes, with the same seed each time; None without a tokenizer, or where the
        weights are spread over processes."""
        if self.tokenizer is None or self._spread:
            return None
        classes = len(self.cache.meta.class_names)
        labels = torch.tensor([i * classes // 8 for i in range(8)])
        copy = Generator(self.model.config, self.model.device).eval()  # of compiled layers too, plain weights
        copy.load_state_dict(self.model.state_dict())
        tokens = sample(copy, labels, seed=0)
        return np.asarray(grid(list(to_uint8(self.tokenizer.decode(tokens.to(self.tokenizer.device)).clamp(0, 1))), 4))

    def evaluate(self, weights: dict[str, Tensor], place: Workplace) -> dict[str, float]:
        assert self.evaluation is not None
        generator = Generator.from_checkpoint(Checkpoint(self.model.config, weights))
        return self.evaluation(generator.to(place.ranks.device).eval(), place)

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
    workers: int = 0,
    init: str | Path | None = None,
    tokenizer: str | Path | None = None,
    run_file: str | None = None,
    reference: str | Path | None = None,
    evaluate_weights: str | Path | None = None,
    evaluate_guidance: float | None = None,
) -> Path:
    """Train on a token cache (alitok_fast.data.validate_token_cache); the folder of the trained model.

    `init` is a generator of these sizes to start from. With `tokenizer`, a model that decodes these tokens,
    pictures are sampled every `pictures_every` steps. Every `evaluate_every` steps, samples with the guidance
    `evaluate_guidance` (None: the model's own) are measured against the statistics in the file `reference`, in the
    features of their network, whose weights may be in the file `evaluate_weights`. Started by torchrun, all processes
    train together. `workers` processes read tokens; with 0 this one does. `run_file` is the text of the run's run.toml
    (`RunConfig.to_toml`).
    Raises ValueError when the cache and the model's sizes do not fit, when the settings, the tokens or the first
    weights differ from those of the run being resumed, or when `out` holds something else, which `force` writes over.
    """
    first = None if init is None else load_generator(init, config=model_config)
    for name, expected, actual in (
        ("tokens", model_config.num_tokens, cache.meta.num_tokens),
        ("codebook_size", model_config.codebook_size, cache.meta.codebook_size),
    ):
        if expected != actual:
            prefix = actual - model_config.grid**2 if name == "tokens" else -1
            advice = f"; prefix_tokens {prefix} would fit" if prefix >= 0 else ""
            raise ValueError(
                f"cache: expected {name} {expected} as in the generator's configuration, got {actual}{advice}"
            )
    if len(cache.meta.class_names) > model_config.num_classes:
        raise ValueError(
            f"cache: expected at most {model_config.num_classes} classes, got {len(cache.meta.class_names)}"
        )
    inputs: dict[str, Any] = {"data": {"name": cache.meta.source, "fingerprint": cache.fingerprint()}}
    if first is not None:
        inputs["init"] = weights_fingerprint(first.state_dict())
    elif resume:  # all weights are in the checkpoint
        inputs |= begun_with(out, "init")
    decoder = None if tokenizer is None else _decoder(tokenizer, cache)
    with joined(device) as ranks:
        check_share(config, ranks.world)
        evaluation = None
        if config.evaluate_every:
            evaluation = SampleEvaluation.open(
                cache, config.evaluate_images, decoder, reference, evaluate_weights, evaluate_guidance, ranks
            )
        torch.manual_seed(config.seed)
        model = Generator(model_config) if first is None else first
        sizes = model_config.to_dict()
        with open_run(out, "generator", config, sizes, resume, inputs, force, ranks=ranks, run_file=run_file) as run:
            task = GeneratorTask(model, cache, config, decoder, evaluation)
            workers = require_count("workers", workers, least=0)
            return train(task, config, run, ranks, tensorboard, progress, workers)


def _decoder(path: str | Path, cache: TokenCache) -> Tokenizer:
    """The tokenizer that the cache's tokens are of; ValueError for another one."""
    tokenizer = load_tokenizer(path)
    found = encoder_fingerprint(tokenizer.state_dict())
    if cache.meta.tokenizer not in ("", found):  # imported caches may not know it
        raise ValueError(f"tokenizer: expected the one of the cache, {cache.meta.tokenizer}, got {found} in {path}")
    return tokenizer
