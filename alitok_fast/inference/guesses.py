"""What a token may be where no pass has looked yet: guessed from the images before."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

REMEMBERED = 32
SAME_CLASS = 4  # an image of the same class counts as so many others


class FirstGuesses:
    """Remembers the last images, and guesses for the next one the token that most of them have at a position.

    A guess decides how many passes an image takes, never what it looks like (`ops.decode.sample_next`).
    """

    def __init__(self, num_tokens: int) -> None:
        self._labels = np.full(REMEMBERED, -1, np.int64)
        self._tokens = np.full((REMEMBERED, num_tokens), -1, np.int64)
        self._agree = np.zeros((REMEMBERED, REMEMBERED, num_tokens), np.float32)  # 1 where two have the same token
        self._count = 0

    def remember(self, labels: Tensor, tokens: Tensor) -> None:
        """Images of the classes (B,), tokens (B, N); the oldest are forgotten."""
        for label, image in zip(labels.tolist()[-REMEMBERED:], tokens.cpu().numpy()[-REMEMBERED:], strict=True):
            place = self._count % REMEMBERED
            self._labels[place], self._tokens[place] = label, image
            self._agree[place] = self._tokens == image
            self._agree[:, place] = self._agree[place]
            self._count += 1

    def guesses(self, labels: Tensor) -> Tensor:
        """(B, N) for the classes (B,), on the CPU; -1 while no image is known."""
        known = min(self._count, REMEMBERED)
        if not known:
            return torch.full((len(labels), self._tokens.shape[1]), -1)
        classes, place = np.unique(labels.cpu().numpy(), return_inverse=True)
        weights = np.where(classes[:, None] == self._labels[:known], np.float32(SAME_CLASS), np.float32(1))
        votes = np.tensordot(weights, self._agree[:known, :known], 1)  # (classes, candidates, N)
        best = np.take_along_axis(self._tokens, votes.argmax(1), 0)
        return torch.from_numpy(best[place])
