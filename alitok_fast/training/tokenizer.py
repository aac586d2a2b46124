"""Training of the tokenizer: stage 1 (everything, causal decoder) and stage 2 (a new bidirectional decoder)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alitok_fast.config import TokenizerConfig
from alitok_fast.data import DataOrder, ImageSource, check_source, source_fingerprint, to_tensor, train_crop
from alitok_fast.data.checks import require_count
from alitok_fast.data.reading import default_workers
from alitok_fast.data.sources import check_picture
from alitok_fast.models.loading import load_tokenizer
from alitok_fast.models.tokenizer import Tokenizer, aux_target, stage2_from_stage1
from alitok_fast.storage.files import weights_fingerprint
from alitok_fast.training.clusters import clusters_of, update_codebook
from alitok_fast.training.config import TokenizerTrainConfig
from alitok_fast.training.loop import StepOutput, train
from alitok_fast.training.losses import auxiliary_loss, reconstruction_loss
from alitok_fast.training.run_folder import STATE_NAME, open_run, read_settings


class TokenizerTask:
    """Loss and data of one stage (section 3.2).

    Stage 1: MSE + auxiliary MSE + quantizer loss, and the clustering update of
    the codebook. Stage 2: MSE; encoder, quantizer and latent tokens are frozen.
    """

    def __init__(self, model: Tokenizer, source: ImageSource, config: TokenizerTrainConfig, workers: int = 1) -> None:
        self.model, self.source, self.config = model, source, config
        self._order = DataOrder(len(source), config.batch_size // config.grad_accumulation, config.seed)
        self._pool = ThreadPoolExecutor(require_count("workers", workers)) if workers != 1 else None

    def batch(self, index: int) -> tuple[Tensor]:
        crops = (self._pool.map if self._pool else map)(self._crop, self._order.at(index))
        return (to_tensor(np.stack(list(crops))),)

    def _crop(self, at: tuple[int, int]) -> np.ndarray:
        epoch, sample = at
        image = check_picture(self.source.image(sample), sample)
        return train_crop(image, self.model.config.image_size, self._order.rng(epoch, sample))

    def loss(self, images: Tensor) -> StepOutput:
        model, output = self.model, self.model(images)
        # Perceptual and adversarial terms join this dictionary; the total is its sum.
        clusters = None
        terms = {"mse": reconstruction_loss(images, output.reconstruction)}
        if model.config.stage == 1:
            target = aux_target(images, model.config)
            terms["aux"] = auxiliary_loss(target, output.aux, model.config, self.config.aux_weight)
            terms["quantizer"] = output.vq.loss
            clusters = clusters_of(output.z, output.vq, model.quantize.codebook)
        return StepOutput(sum(terms.values(), terms["mse"].new_zeros(())), terms, output.vq.usage, clusters)

    def after_backward(self, outputs: Sequence[StepOutput]) -> None:
        if self.model.config.stage == 1:
            update_codebook(self.model.quantize, [output.kept for output in outputs])

    def provenance(self) -> dict[str, Any]:
        return {"data": self.source.name, "images": len(self.source), "training": self.config.to_dict()}


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
) -> Path:
    """Train one stage on an image source (alitok_fast.data.open_source); the folder of the trained model.

    Stage 2 starts from the model folder or checkpoint `stage1`, whose sizes it
    keeps; a resumed run has them in its checkpoint. `workers` threads read pictures (one per core, at most 8, if not
    given). Raises ValueError for a wrong stage, a missing `stage1`, settings,
    pictures or first weights that differ from those of the run being resumed,
    or when `out` holds something else, which `force` writes over.
    """
    if stage not in (1, 2):
        raise ValueError(f"stage: expected 1 or 2, got {stage!r}")
    begun = resume and (Path(out) / STATE_NAME).exists()
    if (stage1 is None and stage == 2 and not begun) or (stage1 is not None and stage == 1):
        raise ValueError(
            f"stage1: expected {'a stage-1 checkpoint' if stage == 2 else 'nothing'} for stage {stage}, got {stage1!r}"
        )
    workers = default_workers() if workers is None else require_count("workers", workers)
    check_source(source)
    inputs: dict[str, Any] = {
        "data": {"name": source.name, "images": len(source), "fingerprint": source_fingerprint(source)}
    }
    torch.manual_seed(config.seed)
    if stage == 1:
        model = Tokenizer(TokenizerConfig.from_dict({**model_config.to_dict(), "stage": 1}))
    elif stage1 is None:  # all weights are in the checkpoint
        saved = read_settings(out) or {}
        inputs["stage1"] = saved.get("inputs", {}).get("stage1")
        sizes = {**saved.get("model", model_config.to_dict()), "stage": 1}
        model = stage2_from_stage1(Tokenizer(TokenizerConfig.from_dict(sizes)), sizes["num_buffer_tokens"])
    else:
        first = load_tokenizer(stage1)
        inputs["stage1"] = weights_fingerprint(first.state_dict())
        model = stage2_from_stage1(first, model_config.num_buffer_tokens)
    with open_run(out, f"tokenizer stage {stage}", config, model.config.to_dict(), resume, inputs, force) as run:
        task = TokenizerTask(model, source, config, workers)
        return train(task, config, run, device, tensorboard, progress)
