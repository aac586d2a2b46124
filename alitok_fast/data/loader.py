"""Temporary."""
from __future__ import annotations

import time

import numpy as np
import torch


def collate(samples):
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))


def to_unit(images):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return images.permute(0, 3, 1, 2).float().div(255).contiguous()


class Loader:
    def __init__(self, read, order, first, stop, workers=0, pin_memory=False, collate=collate):
        self.read, self.order, self.first, self.stop, self.collate = read, order, first, stop, collate
        self.waited = 0.0
        self.seconds = 0.0

    def __enter__(self): return self
    def __exit__(self, *e): pass
    def __iter__(self):
        began = time.perf_counter()
        for index in range(self.first, self.stop):
            t = time.perf_counter()
            batch = self.collate([self.read(e, s) for e, s in self.order.at(index)])
            self.waited += time.perf_counter() - t
            self.seconds = time.perf_counter() - began
            yield batch
