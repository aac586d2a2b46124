"""Which samples step s reads: a function of (seed, step) alone, so that a resumed run reads what it would have read."""

from __future__ import annotations

import numpy as np

from alitok_fast.data.checks import require_count


class DataOrder:
    """An endless walk over `size` samples, newly shuffled in each epoch.

    Position p of the walk is sample permutation(seed, p // size)[p % size];
    step s covers positions s * batch_size to (s + 1) * batch_size - 1, across epoch ends.
    Rank r of `world` processes takes every world-th of them.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        for name, count in (("size", size), ("batch_size", batch_size), ("world", world)):
            require_count(name, count)
        if batch_size % world:
            raise ValueError(f"batch_size: expected a multiple of {world} processes, got {batch_size}")
        if require_count("rank", rank, least=0) >= world:
            raise ValueError(f"rank: expected 0 to {world - 1}, got {rank}")
        require_count("seed", seed, least=0)
        self.size, self.batch_size, self.seed, self.rank, self.world = size, batch_size, seed, rank, world
        self._permutations: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict:  # worker processes need the seed alone
        return {**self.__dict__, "_permutations": {}}

    def at(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, sample) pairs of one step."""
        positions = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
        return [(p // self.size, int(self._permutation(p // self.size)[p % self.size])) for p in positions]

    def rng(self, epoch: int, sample: int) -> np.random.Generator:
        """Random numbers for this sample's augmentation in this epoch."""
        return np.random.default_rng([self.seed, 1, epoch, sample])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # A step touches two epochs at most unless the data set is smaller than a batch_size.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = np.random.default_rng([self.seed, 0, epoch]).permutation(self.size)
        return self._permutations[epoch]
