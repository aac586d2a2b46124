"""What a token may be where no pass has looked yet: guessed from the images before."""

from __future__ import annotations

import torch
from torch import Tensor

REMEMBERED = 32
SAME_CLASS = 4  # an image of the same class counts as so many others


class FirstGuesses:
    """Remembers the last images, and guesses for the next one the token that most of them have at a position.

    A guess decides how many passes an image takes, never what it looks like (`ops.decode.sample_next`).
    """

    @torch.inference_mode(False)  # else they could be written in such a mode only
    def __init__(self, num_tokens: int) -> None:
        self._labels = torch.full((REMEMBERED,), -1)
        self._tokens = torch.full((REMEMBERED, num_tokens), -1)
        self._agree = torch.zeros(REMEMBERED, REMEMBERED, num_tokens)  # 1 where two images have the same token
        self._count = 0

    def remember(self, labels: Tensor, tokens: Tensor) -> None:
        """Images of the classes (B,), tokens (B, N); the oldest are forgotten."""
        for label, image in zip(labels.cpu()[-REMEMBERED:], tokens.cpu()[-REMEMBERED:], strict=True):
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
        classes, place = labels.cpu().unique(return_inverse=True)
        weights = 1.0 + (SAME_CLASS - 1) * (classes[:, None] == self._labels[:known])
        votes = (weights @ self._agree[:known].flatten(1)).view(len(classes), REMEMBERED, -1)
        # Candidates that are not known yet have no votes.
        return self._tokens.gather(0, votes.argmax(1))[place]
