"""How many tokens a pass should try to settle for each image, chosen by what passes cost and settle here and now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Record:
    """Of one window: means over its passes, of which the last count most."""

    passes: int = 0
    seconds: float = 0.0  # of a pass
    tokens: float = 0.0  # of an image, settled by a pass

    def add(self, passes: int, seconds: float, tokens: float, memory: int) -> None:
        self.passes += passes
        share = min(1.0, passes / min(self.passes, memory))
        self.seconds += share * (seconds / passes - self.seconds)
        self.tokens += share * (tokens / passes - self.tokens)

    @property
    def pace(self) -> float:
        """Tokens of an image a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass
class WindowChoice:
    """Chooses the window of the next passes: the one with the most tokens a second so far.

    A wider window costs more and settles more, and both depend on the machine, the model and the images; so both are
    measured while images are sampled. It begins with single tokens. Now and then a few passes try the next wider or the
    next narrower window, and a wider one is tried only from the best, so that where guesses are never right the trials
    cost a small share: `trial` passes of a slightly wider window in `settled` ones.

    Attributes:
        windows: what is chosen from, in rising order, beginning with 1.
        settled: passes with the best window between two trials.
        trial: passes of a trial.
        memory: passes that the means remember.
    """

    windows: Sequence[int]
    settled: int = 64
    trial: int = 3
    memory: int = 256
    _records: dict[int, _Record] = field(default_factory=dict)
    _since: int = 0
    _trying: int = 0  # passes left of a trial
    _tried: int = 1
    _wider: bool = True

    @property
    def best(self) -> int:
        """The window with the most tokens a second of those that were tried."""
        known = [window for window in self.windows if window in self._records]
        return max(known, key=lambda window: self._records[window].pace, default=self.windows[0])

    def next(self) -> tuple[int, int]:
        """The window of the next passes, and how many of them at most before `after` is told what they were like."""
        if self._trying > 0:
            return self._tried, self._trying
        return self.best, max(1, self._until_trial() - self._since)

    def after(self, window: int, passes: int, seconds: float, tokens: float) -> None:
        """What `passes` passes of a window took, and how many tokens they settled for an image, on average."""
        self._records.setdefault(window, _Record()).add(passes, seconds, tokens, self.memory)
        if self._trying > 0:
            self._trying -= passes
            self._since = 0
            return
        self._since += passes
        if self._since >= self._until_trial():
            self._begin_trial()

    def _until_trial(self) -> int:
        # A window that has not been tried, next to the best one, is tried soon.
        return self.trial if self._neighbour(wider=True) not in (None, *self._records) else self.settled

    def _begin_trial(self) -> None:
        wider, narrower = self._neighbour(wider=True), self._neighbour(wider=False)
        choice = wider if (self._wider or narrower is None) else narrower
        choice = narrower if choice is None else choice
        self._wider, self._since = not self._wider, 0
        if choice is not None:
            self._tried, self._trying = choice, self.trial

    def _neighbour(self, wider: bool) -> int | None:
        at = list(self.windows).index(self.best) + (1 if wider else -1)
        return self.windows[at] if 0 <= at < len(self.windows) else None
