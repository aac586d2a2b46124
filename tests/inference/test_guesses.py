"""First guesses: the token that most of the last images have at a position, those of the same class first."""

from __future__ import annotations

import torch

from alitok_fast.inference.guesses import REMEMBERED, SAME_CLASS, FirstGuesses

LENGTH = 7


def test_none_while_nothing_is_known():
    assert torch.equal(FirstGuesses(LENGTH).guesses(torch.tensor([0, 5])), torch.full((2, LENGTH), -1))


def test_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    remembered, labels, tokens = FirstGuesses(LENGTH), [], []
    for batch in (1, 3, 20, 2, 50, 1):
        new = torch.randint(4, (batch,), generator=generator)
        images = torch.randint(3, (batch, LENGTH), generator=generator)
        remembered.remember(new, images)
        labels, tokens = [*labels, *new.tolist()], [*tokens, *images.tolist()]
        asked = torch.tensor([2, 0, 9, 2])
        guesses = remembered.guesses(asked)
        for label, guess in zip(asked.tolist(), guesses.tolist(), strict=True):
            for position, token in enumerate(guess):
                votes = dict.fromkeys(range(3), 0)
                for one, image in list(zip(labels, tokens, strict=True))[-REMEMBERED:]:
                    votes[image[position]] += SAME_CLASS if one == label else 1
                assert votes[token] == max(votes.values())


def test_images_without_a_distribution_give_no_guess():
    remembered = FirstGuesses(LENGTH)
    remembered.remember(torch.tensor([1]), torch.full((1, LENGTH), -1))
    assert (remembered.guesses(torch.tensor([1])) == -1).all()
