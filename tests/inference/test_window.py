"""The choice of windows on simulated machines: what is fastest is found, and looking for it costs next to nothing."""

from __future__ import annotations

import random

import pytest

from alitok_fast.inference.window import WindowChoice

WINDOWS = (1, 2, 3, 4, 6, 8)


class Simulated:
    """A machine on which a pass of a window costs and settles so much, and which others disturb."""

    def __init__(self, cost, settles, seconds=0.005, seed=0):
        self.cost, self.settles, self.each = cost, settles, seconds
        self.random, self.clock = random.Random(seed), 0.0
        self.busy_until = 0.0

    def run(self, choice: WindowChoice, images: int, length: int = 273) -> float:
        """Seconds of so many images."""
        start = self.clock
        for _ in range(images):
            known = 0.0
            while known < length:
                window, passes = choice.next()
                assert window in choice.windows and passes >= 1
                done, seconds, settled = 0, 0.0, 0.0
                while done < min(passes, 16) and known + settled < length:
                    done += 1
                    seconds += self.pass_seconds(window)
                    settled += self.settled(window)
                known += settled
                self.clock += seconds
                choice.after(window, done, seconds, settled)
        return self.clock - start

    def pass_seconds(self, window):
        return self.each * self.cost(window)

    def settled(self, window):
        """1 or more, a whole number with the right mean."""
        mean = self.settles(window)
        return min(window, int(mean) + (self.random.random() < mean % 1))


class Disturbed(Simulated):
    """Single passes take up to twice as long, and a neighbour that halves the speed comes and goes."""

    def pass_seconds(self, window):
        if self.clock > self.busy_until + 3.0:
            self.busy_until = self.clock + self.random.uniform(0.2, 2.0)
        slow = 2.0 if self.clock < self.busy_until else 1.0
        jitter = 1.0 + (self.random.random() < 0.1) * self.random.random() + 0.1 * self.random.random()
        return super().pass_seconds(window) * slow * jitter


def cheap(window):
    return 1 + 0.05 * (window - 1)


def dear(window):
    return float(window)


def often(window):
    return 1 + 0.3 * (window - 1)


def never(window):
    return 1.0


@pytest.mark.parametrize("machine", [Simulated, Disturbed])
@pytest.mark.parametrize(
    ("cost", "settles", "best"),
    [(cheap, often, 8), (dear, often, 1), (cheap, never, 1), (lambda w: 1 + 0.02 * (w - 1) ** 2, often, 6)],
    ids=["cheap rows", "dear rows", "guesses are never right", "in the middle"],
)
def test_finds_the_fastest(machine, cost, settles, best):
    """Or one that is nearly as fast: a single machine in twenty stops a window short of that."""
    pace = {window: settles(window) / cost(window) for window in WINDOWS}
    found = []
    for seed in range(20):
        choice = WindowChoice(WINDOWS)
        machine(cost, settles, seed=seed).run(choice, 12)
        found.append(pace[choice.best] / pace[best])
    assert sorted(found)[2] > 0.93 and min(found) > 0.88, found


def test_looking_costs_less_than_two_percent():
    """Of the first image even, where a guess is never right."""
    for cost in (cheap, lambda window: 1 + 0.3 * (window - 1)):
        machine = Simulated(cost, never)
        assert machine.run(WindowChoice(WINDOWS), 1) < 1.02 * 273 * machine.each
        assert machine.run(WindowChoice(WINDOWS), 20) < 1.01 * 20 * 273 * machine.each


def test_follows_a_change():
    """Guesses that begin to be right, and stop."""
    choice, machine = WindowChoice(WINDOWS), Simulated(cheap, never)
    machine.run(choice, 3)
    machine.settles = often
    machine.run(choice, 40)
    assert choice.best > 3
    machine.settles = never
    machine.run(choice, 60)
    assert choice.best == 1


def test_one_window_is_not_questioned():
    choice = WindowChoice((4,))
    Simulated(dear, never).run(choice, 2)
    assert choice.next()[0] == choice.best == 4
