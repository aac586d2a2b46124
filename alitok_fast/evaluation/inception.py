"""What the field's measures are computed in: InceptionV3 of 2015-12-05, as the ADM suite and torch-fidelity use it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alitok_fast.models.pretrained import fetched, library
from alitok_fast.storage.text import first_line, shown


class InceptionFeatures(NamedTuple):
    """Of B images, float32.

    `pooled` (B, 2048) for FID, KID, precision and recall; `spatial` (B, 2023) for sFID, the first seven channels at
    17 x 17 of the 1 x 1 branch of the block that TensorFlow calls mixed_6, channels last, as in ADM's `mu_s`; `logits`
    (B, 1008), without the bias, for the Inception Score.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class Inception:
    """torch-fidelity's InceptionV3, with the weights and the resizing of TensorFlow's.

    Args:
        weights: torch-fidelity's own file, weights-inception-2015-12-05-6726825d.pth; fetched if not given.
        device: where it computes.
        option: what messages call `weights`.

    Raises:
        ImportError: torch-fidelity is missing (the extra `evaluate`).
        ValueError: a file of something else.
        OSError: a file that cannot be read or fetched.
    """

    def __init__(
        self, weights: str | Path | None = None, device: torch.device | str = "cpu", option: str = "weights"
    ) -> None:
        module = library("torch_fidelity.feature_extractor_inceptionv3", "Inception's features", "evaluate")
        state, self.source = fetched(module.URL_INCEPTION_V3, weights, option, "torch-fidelity's weights")
        checked = io.BytesIO()  # the library unpickles whatever a file holds: it gets tensors alone
        torch.save(dict(state), checked)
        checked.seek(0)
        try:
            network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], checked)
        except RuntimeError as error:
            raise ValueError(
                f"{option}: expected the weights of torch-fidelity's InceptionV3, got {shown(self.source, 300)} "
                f"({first_line(error)})"
            ) from None
        self._network = network.to(device)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._spatial = torch.empty(0)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> InceptionFeatures:
        """images (B, 3, H, W) uint8, on the network's device. Raises TypeError or ValueError for others."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected uint8, got {images.dtype}")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
        pooled, logits = self._network(images)
        return InceptionFeatures(pooled, self._spatial, logits)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its weights by name."""
        return self._network.state_dict()

    def _keep(self, layer: Any, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)
