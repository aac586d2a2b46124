"""probe: the same images with every window in turn, for so many seconds, and what it says of them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from alitok_fast.inference import probe as probing
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.probe import PROBED_WINDOWS, WindowMeasure, probe, probe_table
from alitok_fast.inference.sampler import Sampler
from alitok_fast.models.loading import load_generator

SECONDS = {1: 4.0, 2: 2.0, 3: 5.0}  # of a batch, by window
ROUND = sum(SECONDS.values())


class Machine:
    """A clock, and samplers whose batches take what `SECONDS` says; the first one takes `first` times as long."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.first, self.calls, self.wrong = 100.0, 1.0, [], None
        monkeypatch.setattr(probing, "Sampler", partial(FakeSampler, self))

    def clock(self) -> float:
        return self.now


class FakeSampler:
    def __init__(self, machine: Machine, gen, window: int) -> None:
        self.machine, self.window, self.done, self.last_run = machine, window, 0, None

    def __call__(self, labels, params=None, **overrides) -> torch.Tensor:
        machine = self.machine
        machine.calls.append((self.window, labels.tolist(), params, overrides))
        machine.now += SECONDS[self.window] * (1 if self.done else machine.first)
        self.last_run = SimpleNamespace(tokens_per_pass=self.window + self.done / 4)
        tokens = torch.full((len(labels), 21), int(machine.wrong == (self.window, self.done)))
        self.done += 1
        return tokens


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch)


def measured(gen, machine: Machine, seconds: float, **changes) -> list[WindowMeasure]:
    return probe(gen, **{"windows": tuple(SECONDS), "seconds": seconds, "clock": machine.clock, **changes})


@pytest.mark.parametrize("rounds", [1, 2, 3, 9])
@pytest.mark.parametrize("more", [0.0, 0.99 * ROUND])
def test_as_many_rounds_as_there_is_time_for(tiny_generator, machine, rounds, more):
    begin = machine.now
    results = measured(tiny_generator(), machine, rounds * ROUND + more)
    assert machine.now - begin == rounds * ROUND
    assert [call[0] for call in machine.calls] == list(SECONDS) * rounds, "they take turns"
    assert [one.rounds for one in results] == [max(1, rounds - 1)] * 3


def test_one_round_is_done_however_long_it_takes(tiny_generator, machine):
    results = measured(tiny_generator(), machine, 1e-3)
    assert [one.rounds for one in results] == [1] * 3 and len(machine.calls) == 3
    assert results[0] == WindowMeasure(window=1, tokens_per_pass=1.0, seconds=4.0, speedup=1.0, rounds=1)


def test_results(tiny_generator, machine):
    """The first round, with what is made once, is not among them."""
    machine.first = 2.0
    results = measured(tiny_generator(), machine, 5 * ROUND)  # four rounds
    assert results == [
        WindowMeasure(window=1, tokens_per_pass=1.5, seconds=4.0, speedup=1.0, rounds=3),
        WindowMeasure(window=2, tokens_per_pass=2.5, seconds=2.0, speedup=2.0, rounds=3),
        WindowMeasure(window=3, tokens_per_pass=3.5, seconds=5.0, speedup=0.8, rounds=3),
    ]


def test_the_first_window_is_compared_with(tiny_generator, machine):
    results = measured(tiny_generator(), machine, 3 * ROUND, windows=(2, 1))
    assert [(one.window, one.speedup) for one in results] == [(2, 1.0), (1, 0.5)]


@pytest.mark.parametrize(
    ("params", "overrides", "seed"),
    [
        (None, {}, 0),
        (SamplingParams(seed=40, top_k=3), {}, 40),
        (None, {"seed": 70, "temperature": 0.5}, 70),
        (SamplingParams(seed=40, top_k=3), {"seed": -9, "top_p": 0.5}, -9),
    ],
)
def test_each_round_has_other_classes_and_another_seed(tiny_generator, machine, params, overrides, seed):
    """And the settings that were asked for."""
    measured(tiny_generator(), machine, 4 * ROUND, batch_size=4, params=params, **overrides)
    rounds = [machine.calls[begin : begin + 3] for begin in range(0, 12, 3)]
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5]]
    for index, calls in enumerate(rounds):
        for _, labels, given, rest in calls:
            assert labels == expected[index]
            settings = {**vars(given or SamplingParams()), **rest}
            wanted = {**vars(params or SamplingParams()), **overrides, "seed": seed + index}
            assert settings == wanted


@pytest.mark.parametrize("wrong", [(2, 0), (3, 0), (3, 1)])
def test_windows_that_disagree_are_a_bug(tiny_generator, machine, wrong):
    machine.wrong = wrong
    with pytest.raises(RuntimeError, match=f"probe: expected window {wrong[0]} to give the tokens of window 1"):
        measured(tiny_generator(), machine, 3 * ROUND)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seconds": 0}, ValueError, "seconds: expected a number above 0, got 0"),
        ({"seconds": -1.5}, ValueError, "seconds: expected a number above 0, got -1.5"),
        ({"seconds": float("nan")}, ValueError, "seconds: expected a number above 0, got nan"),
        ({"windows": ()}, ValueError, "windows: expected at least one, got none"),
        ({"windows": (1, 0)}, ValueError, "window: expected .*, got 0"),
        ({"windows": (1, 17)}, ValueError, "window: expected .*, got 17"),
        ({"windows": (1.0,)}, TypeError, "window: expected an integer, got"),
        ({"batch_size": 0}, ValueError, "batch_size: expected .*, got 0"),
        ({"batch_size": -1}, ValueError, "batch_size: expected .*, got -1"),
        ({"batch_size": 1.5}, TypeError, "batch_size: expected an integer, got"),
        ({"temperature": -1.0}, ValueError, "temperature: expected .*, got -1"),
        ({"heat": 1.0}, TypeError, "heat"),
    ],
    ids=str,
)
def test_bad_arguments(tiny_generator, arguments, error, message):
    with pytest.raises(error, match=message):
        probe(tiny_generator(), **{"seconds": 1e-3, **arguments})


def test_training_mode_is_refused(tiny_generator):
    with pytest.raises(ValueError, match="gen: expected evaluation mode"):
        probe(tiny_generator().train(), seconds=1e-3)


def test_with_real_samplers(tiny_generator, monkeypatch):
    """All windows that there are to try, of a generator and of a packed one; it is packed once."""
    gen, models, drawn = tiny_generator(), [], []
    begin, call = Sampler.__init__, Sampler.__call__

    def made(self, *given, **options):
        begin(self, *given, **options)
        models.append(self.model)

    monkeypatch.setattr(Sampler, "__init__", made)
    monkeypatch.setattr(Sampler, "__call__", lambda *given, **more: drawn.append(call(*given, **more)) or drawn[-1])
    for model in (gen, PackedGenerator(gen, torch.int8)):
        models.clear(), drawn.clear()
        results = probe(model, batch_size=3, seconds=1e-6, seed=6)
        assert [one.window for one in results] == list(PROBED_WINDOWS)
        assert all(one is models[0] for one in models) and len(models) == len(PROBED_WINDOWS)
        assert all(torch.equal(tokens, drawn[0]) for tokens in drawn) and drawn[0].shape == (3, 21)
        assert results[0].tokens_per_pass == 1.0 == results[0].speedup
        assert all(one.seconds > 0 and one.rounds == 1 for one in results)


def test_guesses_of_the_demo_are_often_right():
    results = probe(load_generator("demo"), windows=(1, 8), seconds=1e-6)
    assert results[0].tokens_per_pass == 1.0 and results[1].tokens_per_pass > 1.5


def test_table():
    measures = [WindowMeasure(1, 1.0, 0.5, 1.0, 7), WindowMeasure(8, 2.4567, 0.12345, 4.049, 7)]
    head, one, eight, meaning = probe_table([*measures], 2).splitlines()
    assert head.split() == ["window", "tokens/pass", "s/image", "speed"]
    assert one.split() == ["1", "1.00", "0.2500", "1.00x"]
    assert eight.split() == ["8", "2.46", "0.0617", "4.05x"]
    assert len({len(line) for line in (head, one, eight)}) <= 2
    assert meaning == "Medians of 7 batches of 2, the same images with every window. Fastest: window 8."
    assert probe_table(measures[::-1], 1).endswith("Fastest: window 8.")
    assert probe_table(measures[:1], 1).endswith("Fastest: window 1.")
