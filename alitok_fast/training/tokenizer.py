"""Training of the tokenizer: stage 1 (everything, causal decoder) and stage 2 (a new bidirectional decoder)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alitok_fast.config import TokenizerConfig
from alitok_fast.data import DataOrder, ImageSource, check_source, source_fingerprint, to_tensor, train_crop
from alitok_fast.data.checks import require_count
from alitok_fast.data.loader import to_floats
from alitok_fast.data.reading import default_processes
from alitok_fast.data.sources import check_picture
from alitok_fast.data.transforms import centre_crop
from alitok_fast.models.initialization import initialize_with_noise
from alitok_fast.models.loading import load_tokenizer
from alitok_fast.models.tokenizer import Tokenizer, TokenizerOutput, aux_target, stage2_from_stage1
from alitok_fast.storage.checkpoint import Checkpoint
from alitok_fast.storage.files import weights_fingerprint
from alitok_fast.storage.images import grid, to_uint8
from alitok_fast.training.adversary import Adversary
from alitok_fast.training.clusters import Clusters, clusters_of, update_codebook
from alitok_fast.training.config import TokenizerTrainConfig, check_share
from alitok_fast.training.distances import Distances
from alitok_fast.training.loop import train
from alitok_fast.training.losses import auxiliary_loss, reconstruction_loss
from alitok_fast.training.online import ReconstructionEvaluation, Workplace
from alitok_fast.training.phases import DISCRIMINATOR_TURN, Place
from alitok_fast.training.ranks import Ranks, joined
from alitok_fast.training.run_folder import STATE_NAME, begun_with, open_run, read_settings
from alitok_fast.training.task import StepOutput


@dataclass(frozen=True)
class Crops:
    """What worker processes call: one random crop (size, size, 3) uint8 of a picture."""

    source: ImageSource
    size: int
    seed: int

    def __call__(self, epoch: int, sample: int) -> tuple[np.ndarray]:
        image = check_picture(self.source.image(sample), sample)
        return (train_crop(image, self.size, DataOrder(len(self.source), 1, self.seed).rng(epoch, sample)),)


class TokenizerTask:
    """Loss and data of one stage (section 3.2).

    Stage 1: MSE + auxiliary MSE + quantizer loss, and the clustering update of the codebook. Stage 2: MSE; encoder,
    quantizer and latent tokens are frozen, as `freeze_encoder` does in stage 1. To both, a phase may add the error of
    a classifier's logits, LPIPS, and a discriminator, whose steps then alternate with the tokenizer's.
    `evaluation` is needed where `evaluate_every` is above 0.
    """

    def __init__(
        self,
        model: Tokenizer,
        source: ImageSource,
        config: TokenizerTrainConfig,
        evaluation: ReconstructionEvaluation | None = None,
    ) -> None:
        self.model, self.source, self.config, self.evaluation = model, source, config, evaluation
        self.adversary = Adversary(config) if config.schedule.adversarial else None
        self.distances = Distances(config)
        if config.freeze_encoder or model.config.stage == 2:
            freeze_encoder(model)
        self._called: nn.Module = model

    @property
    def discriminator(self) -> nn.Module | None:
        return None if self.adversary is None else self.adversary.module

    def prepare(self, called: Callable[[nn.Module], nn.Module], ranks: Ranks) -> None:
        self._called = called(self.model)
        self.distances.to(ranks.device)
        if self.adversary is not None:
            self.adversary.prepare(called, ranks)

    def order(self, rank: int = 0, world: int = 1) -> DataOrder:
        config = self.config
        return DataOrder(len(self.source), config.batch_size // config.grad_accumulation, config.seed, rank, world)

    @property
    def read(self) -> Crops:
        return Crops(self.source, self.model.config.image_size, self.config.seed)

    def loss(self, place: Place, images: Tensor) -> StepOutput:
        """`images` (B, 3, H, W) uint8."""
        images = to_floats(images)
        if place.turn == DISCRIMINATOR_TURN:
            return self._discriminator_loss(images)
        output = self._called(images)
        terms = {"mse": reconstruction_loss(images, output.reconstruction)}
        if output.aux is not None:
            target = aux_target(images, self.model.config)
            terms["aux"] = auxiliary_loss(target, output.aux, self.model.config, self.config.aux_weight)
        if self._learns_codes:
            terms["quantizer"] = output.vq.loss
        terms |= self.distances(place.phase, images, output.reconstruction)
        figures = dict(terms)
        if place.phase.adversarial and self.adversary is not None:
            last_layer: Any = self.model.decoder.ffn[0].weight
            rest = sum(terms.values(), images.new_zeros(()))
            added = self.adversary.generator_terms(
                output.reconstruction.float(), rest, last_layer, place.phase.adversarial
            )
            terms["adversarial"] = added["adversarial"]
            figures |= added
        total = sum(terms.values(), images.new_zeros(()))
        return StepOutput(total, figures, output.vq.usage, self._clusters(output))

    def _discriminator_loss(self, images: Tensor) -> StepOutput:
        assert self.adversary is not None
        with torch.no_grad():
            output = self._called(images)
        loss, figures = self.adversary.discriminator_terms(images, output.reconstruction)
        return StepOutput(loss, figures, output.vq.usage, self._clusters(output))

    @property
    def _learns_codes(self) -> bool:
        return self.model.config.stage == 1 and not self.config.freeze_encoder

    def _clusters(self, output: TokenizerOutput) -> Clusters | None:
        return clusters_of(output.z, output.vq, self.model.quantize.codebook) if self._learns_codes else None

    def after_backward(self, outputs: Sequence[StepOutput]) -> None:
        if self._learns_codes:
            update_codebook(self.model.quantize, [output.kept for output in outputs])

    def state(self) -> dict[str, Tensor]:
        return self.adversary.state() if self.adversary else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.adversary:
            self.adversary.load_state(state)

    def pictures(self) -> np.ndarray:
        """Up to eight pictures of the data, and below each its reconstruction."""
        size, count = self.model.config.image_size, min(8, len(self.source))
        chosen = [i * len(self.source) // count for i in range(count)]
        originals = np.stack([centre_crop(check_picture(self.source.image(i), i), size) for i in chosen])
        images = to_tensor(originals).to(self.model.device)
        decoded = self.model(images).reconstruction.clamp(0, 1)
        return np.asarray(grid([*originals, *to_uint8(decoded)], count))

    def evaluate(self, weights: dict[str, Tensor], place: Workplace) -> dict[str, float]:
        assert self.evaluation is not None
        tokenizer = Tokenizer.from_checkpoint(Checkpoint(self.model.config, weights))
        return self.evaluation(tokenizer.to(place.ranks.device).eval(), place)

    def provenance(self) -> dict[str, Any]:
        return {"data": self.source.name, "images": len(self.source), "training": self.config.to_dict()}


def freeze_encoder(model: Tokenizer) -> None:
    """Train the decoder alone: what decides an image's tokens stays as it is."""
    model.latent_tokens.requires_grad_(False)
    for module in (model.encoder, model.quantize):
        module.requires_grad_(False)


def train_tokenizer(
    source: ImageSource,
    out: str | Path,
    stage: int,
    model_config: TokenizerConfig,
    config: TokenizerTrainConfig,
    stage1: str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
    workers: int | None = None,
    force: bool = False,
    init: str | Path | None = None,
    run_file: str | None = None,
    held_out: ImageSource | None = None,
    evaluate_network: str | None = None,
    evaluate_weights: str | Path | None = None,
) -> Path:
    """Train one stage on an image source (alitok_fast.data.open_source); the folder of the trained model.

    Stage 2 starts from the model folder or checkpoint `stage1`, whose sizes it keeps. Either stage may start from the
    weights of `init` instead, a tokenizer of the same sizes; where its decoder is of the other stage, the encoder, the
    latent tokens and the codebook are taken. A resumed run has all weights in its checkpoint. Started by torchrun, all
    processes train together. `workers` processes read pictures (one per core, at most 8, if not given). `run_file` is
    the text of the run's run.toml (`RunConfig.to_toml`). Every `evaluate_every` steps it reconstructs pictures of
    `held_out`, and measures how far they then are from what they were in the features of `evaluate_network`, if one is
    named, whose weights may be in the file `evaluate_weights`.
    Raises ValueError for a wrong stage, a missing `stage1`, settings, pictures or first weights that differ from those
    of the run being resumed, or when `out` holds something else, which `force` writes over.
    """
    if stage not in (1, 2):
        raise ValueError(f"stage: expected 1 or 2, got {stage!r}")
    begun = resume and (Path(out) / STATE_NAME).exists()
    if (stage1 is None and init is None and stage == 2 and not begun) or (stage1 is not None and stage == 1):
        raise ValueError(
            f"stage1: expected {'a stage-1 checkpoint' if stage == 2 else 'nothing'} for stage {stage}, got {stage1!r}"
        )
    workers = default_processes() if workers is None else require_count("workers", workers, least=0)
    check_source(source)
    data = {"name": source.name, "images": len(source), "fingerprint": source_fingerprint(source)}
    torch.manual_seed(config.seed)
    model, begins_with = _first_model(out, stage, model_config, stage1, init, resume, config.initialization)
    with joined(device) as ranks:
        check_share(config, ranks.world)
        evaluation = None
        if config.evaluate_every:
            evaluation = ReconstructionEvaluation.open(
                held_out, config.evaluate_images, model.config.image_size, evaluate_network, evaluate_weights, ranks
            )
        task = TokenizerTask(model, source, config, evaluation)
        inputs = {"data": data, **begins_with, **task.distances.fingerprints()}
        kind, sizes = f"tokenizer stage {stage}", model.config.to_dict()
        with open_run(out, kind, config, sizes, resume, inputs, force, ranks=ranks, run_file=run_file) as run:
            return train(task, config, run, ranks, tensorboard, progress, workers)


def _first_model(
    out: str | Path,
    stage: int,
    config: TokenizerConfig,
    stage1: str | Path | None,
    init: str | Path | None,
    resume: bool,
    initialization: str,
) -> tuple[Tokenizer, dict[str, Any]]:
    """The model that a run begins with, and fingerprints of the weights that it was given; of a run that goes on, whose
    weights are in its checkpoint, those that it had been given."""
    if (given := stage1 if init is None else init) is not None:
        first = load_tokenizer(given)
        begins_with = {"stage1" if init is None else "init": weights_fingerprint(first.state_dict())}
        if init is not None and first.config.stage == stage:
            return first, begins_with
        make = _stage2_from if stage == 2 else _stage1_from
        return make(first, config, initialization), begins_with
    begins_with = begun_with(out, "init", "stage1") if resume else {}
    if stage == 1:
        model = Tokenizer(TokenizerConfig.from_dict({**config.to_dict(), "stage": 1}))
        if initialization == "noise":
            initialize_with_noise(model)
        return model, begins_with
    saved = TokenizerConfig.from_dict((read_settings(out) or {}).get("model", config.to_dict()))
    return _stage2_from(Tokenizer(replace(saved, stage=1)), saved, initialization), begins_with


def _stage2_from(first: Tokenizer, config: TokenizerConfig, initialization: str) -> Tokenizer:
    model = stage2_from_stage1(first, config.num_buffer_tokens, config.causal_decoder)
    if initialization == "noise":
        initialize_with_noise(model.decoder)
    return model


def _stage1_from(second: Tokenizer, config: TokenizerConfig, initialization: str) -> Tokenizer:
    """A stage-1 tokenizer with the encoder, latent tokens and codebook of a stage-2 one, and a fresh decoder."""
    causal, auxiliary = config.causal_decoder, config.auxiliary_loss
    model = Tokenizer(replace(second.config, stage=1, causal_decoder=causal, auxiliary_loss=auxiliary))
    if initialization == "noise":
        initialize_with_noise(model.decoder)
    shared = {name: value for name, value in second.state_dict().items() if not name.startswith("decoder.")}
    model.load_state_dict(shared, strict=False)
    return model
