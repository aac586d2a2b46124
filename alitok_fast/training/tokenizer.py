"""Training of the tokenizer: stage 1 (everything, causal decoder) and stage 2 (a new bidirectional decoder)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alitok_fast.config import TokenizerConfig
from alitok_fast.data import DataOrder, to_tensor, train_crop
from alitok_fast.models.loading import load_tokenizer
from alitok_fast.models.tokenizer import Tokenizer, aux_target, stage2_from_stage1
from alitok_fast.training.config import TokenizerTrainConfig
from alitok_fast.training.loop import StepOutput, train
from alitok_fast.training.losses import auxiliary_loss, reconstruction_loss
from alitok_fast.training.run_folder import RunFolder


class TokenizerTask:
    """Loss and data of one stage (section 3.2).

    Stage 1: MSE + auxiliary MSE + quantizer loss, and the clustering update of
    the codebook. Stage 2: MSE; encoder, quantizer and latent tokens are frozen.
    """

    def __init__(self, model: Tokenizer, source, config: TokenizerTrainConfig) -> None:
        self.model, self.source, self.config = model, source, config
        self._order = DataOrder(len(source), config.batch_size // config.grad_accumulation, config.seed)
        self._output = None

    def batch(self, index: int) -> tuple[Tensor]:
        size = self.model.config.image_size
        crops = [
            train_crop(self.source.image(sample), size, self._order.rng(epoch, sample))
            for epoch, sample in self._order.at(index)
        ]
        return (to_tensor(np.stack(crops)),)

    def loss(self, images: Tensor) -> StepOutput:
        model, output = self.model, self.model(images)
        # Perceptual and adversarial terms join this dictionary; the total is its sum.
        terms = {"mse": reconstruction_loss(images, output.reconstruction)}
        if model.config.stage == 1:
            target = aux_target(images, model.config)
            terms["aux"] = auxiliary_loss(target, output.aux, model.config, self.config.aux_weight)
            terms["quantizer"] = output.vq.loss
        self._output = output
        return StepOutput(sum(terms.values()), terms, output.vq.usage)

    def after_backward(self) -> None:
        if self.model.config.stage == 1:
            self.model.quantize.cluster_update(self._output.z, self._output.vq)
        self._output = None

    def provenance(self) -> dict[str, Any]:
        return {"data": self.source.name, "images": len(self.source), "training": self.config.to_dict()}


def train_tokenizer(
    source,
    out: str | Path,
    stage: int,
    model_config: TokenizerConfig,
    config: TokenizerTrainConfig,
    stage1: str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
) -> Path:
    """Train one stage on an image source (alitok_fast.data.open_source); the folder of the trained model.

    Stage 2 starts from the model folder or checkpoint `stage1`, whose sizes it keeps.
    Raises ValueError for a wrong stage, a missing `stage1`, or settings that
    differ from those of the run being resumed.
    """
    if stage not in (1, 2):
        raise ValueError(f"stage: expected 1 or 2, got {stage!r}")
    if (stage == 2) != (stage1 is not None):
        raise ValueError(
            f"stage1: expected {'a stage-1 checkpoint' if stage == 2 else 'nothing'} for stage {stage}, got {stage1!r}"
        )
    torch.manual_seed(config.seed)
    if stage == 1:
        fields = {**model_config.to_dict(), "stage": 1}
        model = Tokenizer(TokenizerConfig.from_dict(fields))
    else:
        model = stage2_from_stage1(load_tokenizer(stage1), model_config.num_buffer_tokens)
    run = RunFolder(out, f"tokenizer stage {stage}", config, model.config.to_dict(), resume)
    return train(TokenizerTask(model, source, config), config, run, device, tensorboard, progress)
