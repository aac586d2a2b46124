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

    def __init__(self, num_tokens: int) -> None:
        self.labels = torch.empty(0, dtype=torch.int64)
        self.tokens = torch.empty(0, num_tokens, dtype=torch.int64)

    def remember(self, labels: Tensor, tokens: Tensor) -> None:
        """Images of the classes (B,), tokens (B, N); the oldest are forgotten."""
        self.labels = torch.cat([self.labels, labels.cpu()])[-REMEMBERED:]
        self.tokens = torch.cat([self.tokens, tokens.cpu()])[-REMEMBERED:]

    def guesses(self, labels: Tensor) -> Tensor:
        """(B, N) for the classes (B,), on the CPU; -1 while no image is known."""
        if not len(self.labels):
            return torch.full((len(labels), self.tokens.shape[1]), -1)
        classes, place = labels.cpu().unique(return_inverse=True)
        weights = 1.0 + (SAME_CLASS - 1) * (classes[:, None] == self.labels)
        agree = (self.tokens[:, None] == self.tokens).float()  # (voters, candidates, N)
        votes = torch.einsum("cv,vmn->cmn", weights, agree)
        return self.tokens.gather(0, votes.argmax(1))[place]
