"""A small classifier trained on the real images, to ask whether samples look like the class asked for.

python -m alitok_fast.evaluation.demo --data /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SmallClassifier(nn.Module):
    """Three convolutions and two linear layers on the grey image; any square size from 16 pixels."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )

        self.features = nn.Sequential(stage(1, width), stage(width, 2 * width), stage(2 * width, 4 * width))
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * width, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> logits (B, classes)."""
        return self.head(self.features(images.mean(1, keepdim=True) * 2 - 1))


def train_classifier(
    images: Tensor,
    labels: Tensor,
    classes: int,
    epochs: int = 3,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> SmallClassifier:
    """Train on images (n, 3, H, W) uint8 and labels (n,) with random mirror images; in evaluation mode at the end."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, got {images.dtype}")
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    model = SmallClassifier(classes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    batch_size = min(batch_size, len(images))
    per_epoch = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * per_epoch)
    for epoch in range(epochs):
        permutation = torch.from_numpy(order.permutation(len(images)))
        for step in range(per_epoch):
            chosen = permutation[step * batch_size : (step + 1) * batch_size]
            x = images[chosen].float() / 255
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            loss = F.cross_entropy(model(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(epoch * per_epoch + step, float(loss.detach()))
    return model.eval()


@torch.inference_mode()
def predict(model: SmallClassifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Classes (n,) of images (n, 3, H, W), uint8 or floats in [0, 1]."""
    scale = 255 if images.dtype == torch.uint8 else 1
    return torch.cat([model(part.float() / scale).argmax(1) for part in images.split(batch_size)])


@torch.inference_mode()
def features(model: SmallClassifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """What the last layer reads, (n, 128) float64, of images (n, 3, H, W), uint8 or floats in [0, 1]."""
    scale = 255 if images.dtype == torch.uint8 else 1
    body = [model.head[:-1](model.features((part.float() / scale).mean(1, keepdim=True) * 2 - 1))
            for part in images.split(batch_size)]  # fmt: skip
    return torch.cat(body).double()
