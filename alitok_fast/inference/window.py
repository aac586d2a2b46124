"""How many tokens a pass should try to settle for each image, chosen by what passes cost and settle here and now."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST_INTERVAL, LONGEST_INTERVAL = 8, 1024  # passes between two trials
PAIRS = (3, 8)  # of a trial: where the result is clear, and where it is close
CLOSE = 0.1
PAIR_SECONDS, PAIR_PASSES = 0.004, (2, 8)  # one side of a pair takes about so long, in so many passes
REMEMBERED_PASSES, REMEMBERED_PAIRS = 256, 9
ENOUGH_PASSES = 6  # without a single right guess
MARGIN = 1.05  # a wider window has to gain so much more than it costs


@dataclass
class _Mean:
    """Of what a pass of one window settles for an image; the last passes count most."""

    tokens: float = 0.0
    passes: int = 0

    def add(self, passes: int, tokens: float) -> None:
        self.passes += passes
        self.tokens += passes / min(self.passes, REMEMBERED_PASSES) * (tokens / passes - self.tokens)


@dataclass
class _Trial:
    """Of a window beside the best one: they take turns, so that a busy moment of the machine meets both."""

    window: int  # by its place among the windows
    passes: int  # of one side of a pair
    best_seconds: float | None = None  # of a pass of the best window in this pair; None: it comes next
    pairs: int = 0


@dataclass
class WindowChoice:
    """Chooses the window of the next passes: the one that settles the most tokens a second.

    A wider window costs more and settles more, and both depend on the machine, the model and the images; so both are
    measured while images are sampled, by passes that the images need anyway. It begins with the first window. Now and
    then the next wider or the next narrower one is tried in pairs of a few passes with the best one, and is taken where
    its gain in tokens is more than its cost in time, the median of the last pairs. Trials that change nothing become
    rare, and end at once where not a single guess was right.

    Attributes:
        windows: what is chosen from, in rising order.
    """

    windows: Sequence[int]
    _best: int = 0
    _tokens: dict[int, _Mean] = field(default_factory=dict)
    _costs: dict[int, deque[float]] = field(default_factory=dict)  # seconds of a pass over those of the next narrower
    _trial: _Trial | None = None
    _wider: bool = True
    _interval: int = FIRST_INTERVAL
    _since: int = 0

    @property
    def best(self) -> int:
        """The window that is used between trials."""
        return self.windows[self._best]

    def next(self) -> tuple[int, int]:
        """The window of the next passes, and how many of them at most before `after` is told what they were like."""
        if self._trial is None:
            return self.best, LONGEST_INTERVAL if len(self.windows) == 1 else self._interval - self._since
        place = self._best if self._trial.best_seconds is None else self._trial.window
        return self.windows[place], self._trial.passes

    def after(self, window: int, passes: int, seconds: float, tokens: float) -> None:
        """What `passes` passes of `next`'s window took, and how many tokens they settled for an image, on average."""
        if len(self.windows) == 1:
            return
        self._tokens.setdefault(self.windows.index(window), _Mean()).add(passes, tokens)
        trial, each = self._trial, seconds / passes
        if trial is None:
            self._since += passes
            if self._since >= self._interval:
                self._begin_trial(each)
        elif trial.best_seconds is None:
            trial.best_seconds = each
        else:
            self._end_pair(trial, trial.best_seconds, each)

    def _begin_trial(self, seconds: float) -> None:
        places = [place for place in (self._best + 1, self._best - 1) if 0 <= place < len(self.windows)]
        place = places[0] if self._wider else places[-1]
        least, most = PAIR_PASSES
        self._trial = _Trial(place, min(max(math.ceil(PAIR_SECONDS / max(seconds, 1e-9)), least), most))

    def _end_pair(self, trial: _Trial, best: float, seconds: float) -> None:
        narrow, wide = sorted((self._best, trial.window))
        cost = seconds / best if trial.window == wide else best / seconds
        self._costs.setdefault(wide, deque(maxlen=REMEMBERED_PAIRS)).append(cost)
        trial.best_seconds, trial.pairs = None, trial.pairs + 1
        settled, (few, many) = self._tokens[wide], PAIRS
        hopeless = trial.window == wide and settled.tokens <= 1 and settled.passes >= ENOUGH_PASSES
        gain = settled.tokens / self._tokens[narrow].tokens / statistics.median(self._costs[wide])
        if trial.pairs < (many if abs(gain - 1) < CLOSE else few) and not hopeless:
            return
        better = wide if gain > MARGIN else narrow
        if better == self._best:
            self._wider = not self._wider
            self._interval = min(self._interval * (8 if hopeless else 2), LONGEST_INTERVAL)
        else:
            self._best, self._interval = better, FIRST_INTERVAL
        self._trial, self._since = None, 0
