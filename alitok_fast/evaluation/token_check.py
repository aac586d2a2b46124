"""What a token cache holds, read whole: how codes and classes are used, and what hints at a mistake in making it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from alitok_fast.data.token_cache import TokenCache
from alitok_fast.evaluation.codebook import codebook_perplexity, codebook_usage
from alitok_fast.storage.text import shown

_PIECE = 1024  # images looked at together
_COLLAPSED = 20  # a perplexity below the codes divided by this
_SUSPICIOUS = 0.5  # share of the images in which two crops are the same


@dataclass(frozen=True)
class TokenReport:
    """What `check_tokens` counted.

    `code_counts` (K,) and `class_counts` (C,) of tokens and images; `repeated` (n, 2) an image and an earlier one with
    the same tokens; `equal_crops` the share of images in which two crops are the same, by their numbers; `constant` the
    number of crops that are one code over and over; `class_names` and `labels` as in the cache.
    """

    code_counts: np.ndarray
    class_counts: np.ndarray
    repeated: np.ndarray
    equal_crops: dict[tuple[int, int], float]
    constant: int
    class_names: list[str]
    labels: np.ndarray

    @property
    def usage(self) -> float:
        """Share of the codes that occur."""
        return codebook_usage(torch.from_numpy(self.code_counts))

    @property
    def perplexity(self) -> float:
        """As `codebook_perplexity`."""
        return codebook_perplexity(torch.from_numpy(self.code_counts))

    @property
    def summary(self) -> list[str]:
        """What was counted, in lines."""
        codes, used, present = (
            len(self.code_counts),
            int((self.code_counts > 0).sum()),
            self.class_counts[self._present],
        )
        return [
            f"codes: {used:,} of {codes:,} used ({self.usage:.1%}), perplexity {self.perplexity:,.1f}",
            f"classes: {len(present):,} of {len(self.class_counts):,} with images, {present.min():,} to "
            f"{present.max():,} in each",
        ]

    @property
    def warnings(self) -> list[str]:
        """What may be a mistake, in lines; none where there is nothing to be said."""
        return [line for line in (self._of_codes(), self._of_classes(), *self._of_images(), *self._of_crops()) if line]

    @property
    def _present(self) -> np.ndarray:
        return self.class_counts > 0

    def _of_codes(self) -> str | None:
        codes = len(self.code_counts)
        if self.perplexity >= codes / _COLLAPSED:
            return None
        return f"codes: expected a perplexity of at least {codes / _COLLAPSED:,.1f}, the codebook has collapsed"

    def _of_classes(self) -> str | None:
        absent = np.flatnonzero(~self._present)
        if not len(absent):
            return None
        names = ", ".join(f"{number} ({shown(self.class_names[number])})" for number in absent[:3])
        return f"classes: {len(absent):,} have no image: {names}{', ...' if len(absent) > 3 else ''}"

    def _of_images(self) -> list[str]:
        lines = []
        if self.constant:
            lines.append(f"crops: {self.constant:,} are one code over and over")
        if len(self.repeated):
            image, earlier = self.repeated[0]
            lines.append(
                f"images: {len(self.repeated):,} have the tokens of an earlier one, such as {image} those of {earlier}"
            )
            other = self.repeated[self.labels[self.repeated[:, 0]] != self.labels[self.repeated[:, 1]]]
            if len(other):
                (image, earlier), labels = other[0], self.labels[other[0]]
                lines.append(
                    f"images: {len(other):,} of them have another label than the earlier one, such as {image} "
                    f"({labels[0]}) and {earlier} ({labels[1]})"
                )
        return lines

    def _of_crops(self) -> list[str]:
        return [
            f"crops: number {second} is number {first} again in {share:.1%} of the images"
            for (first, second), share in self.equal_crops.items()
            if share > _SUSPICIOUS
        ]


def check_tokens(cache: TokenCache, progress: Callable[[Iterable], Iterable] = iter) -> TokenReport:
    """Read an opened cache whole and count; its ranges and shapes are checked by `validate_token_cache`."""
    meta = cache.meta
    factors = np.random.default_rng(0).integers(0, 1 << 63, (meta.num_crops + 1, meta.num_tokens), np.uint64) * 2 + 1
    counts = np.zeros(meta.codebook_size, np.int64)
    hashes = np.empty((len(cache), meta.num_crops), np.uint64)  # modulo 2^64: equal tokens, equal hashes
    constant = 0
    for first in progress(range(0, len(cache), _PIECE)):
        piece = np.asarray(cache.tokens[first : first + _PIECE])
        counts += np.bincount(piece.reshape(-1), minlength=meta.codebook_size)
        hashes[first : first + _PIECE] = piece.astype(np.uint64) @ factors[-1]
        constant += int((piece == piece[..., :1]).all(-1).sum())
    pairs = itertools.combinations(range(meta.num_crops), 2)
    return TokenReport(
        code_counts=counts,
        class_counts=np.bincount(cache.labels, minlength=len(meta.class_names)),
        repeated=_repeated(cache.tokens, hashes @ factors[:-1, 0]),
        equal_crops={(i, j): float((hashes[:, i] == hashes[:, j]).mean()) for i, j in pairs},
        constant=constant if meta.num_tokens > 1 else 0,
        class_names=meta.class_names,
        labels=cache.labels,
    )


def _repeated(tokens: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """(n, 2): images whose tokens are those of an earlier image, and the first such; the hashes tell where to look."""
    order = np.argsort(hashes, kind="stable")
    begins = np.r_[True, hashes[order][1:] != hashes[order][:-1]]
    firsts = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    found = np.stack([order, firsts], 1)[~begins]
    found = np.array([pair for pair in found if np.array_equal(tokens[pair[0]], tokens[pair[1]])], np.int64)
    return found.reshape(-1, 2)[np.argsort(found.reshape(-1, 2)[:, 0])]
