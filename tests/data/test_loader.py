"""The loader: the same batches from any number of workers, errors as they were, and no process left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from alitok_fast.data import (
    DataOrder,
    Loader,
    UnreadableImageError,
    WorkerDiedError,
    open_source,
    pictures,
    throughput_line,
    to_floats,
    to_tensor,
    train_crop,
)
from alitok_fast.data.pictures import PixelGate, take_turns

ROOT = Path(__file__).resolve().parents[2]
ORDER = DataOrder(20, 4, seed=5)


def pair(epoch: int, sample: int) -> tuple[np.ndarray, int]:
    return np.full((2, 3), 100 * epoch + sample, np.uint8)[:, ::-1], sample


class Crops:
    """What training reads: a crop and a label."""

    def __init__(self, source, order: DataOrder) -> None:
        self.source, self.order = source, order

    def __call__(self, epoch: int, sample: int) -> tuple[np.ndarray, int]:
        crop = train_crop(self.source.image(sample), 32, self.order.rng(epoch, sample))
        return crop, int(self.source.labels[sample])


def killed(epoch: int, sample: int) -> tuple[int]:
    if sample == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return (sample,)


def left(epoch: int, sample: int) -> tuple[int]:
    if sample == 7:
        os._exit(3)
    return (sample,)


class Odd(Exception):
    """An exception that pickle cannot make again."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def odd(epoch: int, sample: int) -> tuple[int]:
    raise Odd(1, 2)


def uneven(epoch: int, sample: int) -> tuple[np.ndarray]:
    return (np.zeros(sample),)


def has_turn(epoch: int, sample: int) -> tuple[int]:
    return (int(not isinstance(pictures._process.turn, contextlib.nullcontext)),)


def bare(epoch: int, sample: int) -> np.ndarray:
    return np.zeros(3)


# ---- one process ----


@pytest.mark.parametrize(("first", "stop"), [(0, 7), (3, 11), (5, 5)])
def test_batches_are_those_of_the_order(first: int, stop: int) -> None:
    with Loader(pair, ORDER, first, stop) as loader:
        batches = list(loader)
    assert len(batches) == stop - first
    for index, (pixels, labels) in enumerate(batches, first):
        at = ORDER.at(index)
        assert pixels.dtype == torch.uint8 and labels.dtype == torch.int64
        assert labels.tolist() == [sample for _, sample in at]
        assert pixels[:, 0, 0].tolist() == [100 * epoch + sample for epoch, sample in at]


def test_what_a_reader_raises_is_raised() -> None:
    with pytest.raises(ValueError, match=r"samples: expected equal shapes, got \(\(.*,\),\) and \(\(.*,\),\)"):
        next(Loader(uneven, ORDER, 0, 3))
    with pytest.raises(Odd):
        next(Loader(odd, ORDER, 0, 3))
    with pytest.raises(TypeError, match="read: expected a tuple of arrays and whole numbers, got ndarray"):
        next(Loader(bare, ORDER, 0, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": -1}, "first: expected a whole number of at least 0, got -1"),
        ({"first": 3, "stop": 2}, "stop: expected at least first=3, got 2"),
        ({"workers": -1}, "workers: expected a whole number of at least 0, got -1"),
        ({"workers": True}, "workers: expected a whole number of at least 0, got True"),
    ],
)
def test_arguments_are_checked_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(pair, ORDER, **{"first": 0, "stop": 1, **arguments})


def test_functions_that_cannot_be_sent_are_refused() -> None:
    with pytest.raises(TypeError, match="read, collate: expected functions that can be sent to worker processes"):
        Loader(lambda epoch, sample: (sample,), ORDER, 0, 1, workers=1)


def slowly(epoch: int, sample: int) -> tuple[int]:
    time.sleep(0.02)
    return (sample,)


def test_who_waits_is_counted_from_the_first_batch_on() -> None:
    with Loader(slowly, ORDER, 0, 4) as loader:
        assert (loader.waited, loader.seconds) == (0, 0)
        next(loader)
        assert loader.waited == 0
        for _ in loader:
            pass
    assert 0.1 < loader.waited <= loader.seconds
    ended = loader.seconds
    time.sleep(0.01)
    assert loader.seconds == ended
    with Loader(pair, ORDER, 0, 4) as loader:
        for _ in loader:
            time.sleep(0.03)
    assert loader.waited < 0.8 * loader.seconds


def test_the_line_says_who_waits() -> None:
    assert throughput_line(1234.5, 0.4).startswith(
        "1,234 samples/s: the model waited for data 40% of the time; more workers"
    )
    assert throughput_line(56.78, 0.02) == (
        "56.8 samples/s: the loader waits for the model (2% of the time the model waited for data)"
    )


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (2, 3, 5, 7)])
def test_floats_are_those_of_to_tensor(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    last = pixels if shape[3] == 3 else pixels.transpose(0, 2, 3, 1)
    floats = to_floats(torch.from_numpy(pixels))
    assert torch.equal(floats, to_tensor(last)) and floats.is_contiguous()
    with pytest.raises(ValueError, match=r"images: expected .* got torch.float32 \(2, 3, 5, 7\)"):
        to_floats(torch.zeros(2, 3, 5, 7))


def test_large_pictures_take_turns_between_processes() -> None:
    class Turn:
        held = 0

        def __enter__(self) -> None:
            self.held += 1

        def __exit__(self, *exception: object) -> None:
            pass

    turn, gate = Turn(), PixelGate(100)
    take_turns(turn)
    try:
        for pixels in (25, 26, 1000):
            with gate.hold(pixels):
                pass
    finally:
        take_turns(contextlib.nullcontext())
    assert turn.held == 2


# ---- several processes ----


@pytest.fixture
def photos(tmp_path: Path, jpegs, write_shard) -> Path:
    for number in range(2):
        write_shard(f"{number}.tar", *({"__key__": f"{i}", "jpg": jpegs[i % 4], "cls": i} for i in range(10)))
    return tmp_path


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_batches(photos: Path) -> None:
    crops = Crops(open_source(photos, image_size=32), ORDER)
    crops.source.image(0)  # open files stay here
    expected = list(Loader(crops, ORDER, 2, 13))
    for workers in (1, 3):
        with Loader(crops, ORDER, 2, 13, workers, pin_memory=True) as loader:
            found = list(loader)
        assert len(found) == 11
        for batch, other in zip(found, expected, strict=True):
            assert [part.dtype for part in batch] == [torch.uint8, torch.int64]
            assert all(map(torch.equal, batch, other))
        assert found[0][0].is_shared() and found[0][0].shape == (4, 32, 32, 3)


@pytest.mark.slow
def test_workers_share_a_turn_for_large_pictures() -> None:
    with Loader(has_turn, ORDER, 0, 4, 2) as loader:
        assert all(batch.tolist() == [1] * 4 for (batch,) in loader)


@pytest.mark.slow
def test_an_unreadable_picture_is_named(photos: Path, write_shard) -> None:
    write_shard("2.tar", {"__key__": "bad", "jpg": b"none", "cls": 0})
    order = DataOrder(21, 3, seed=0)
    with pytest.raises(UnreadableImageError, match="2.tar: bad.jpg: expected a readable image") as error:
        with Loader(Crops(open_source(photos), order), order, 0, 7, 2) as loader:
            list(loader)
    assert "Traceback" in str(error.value.__cause__) and "Traceback" not in str(error.value)
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        list(Loader(odd, ORDER, 0, 3, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "message"),
    [
        (killed, "process .* killed by SIGKILL; .* want of memory: use fewer workers"),
        (left, "process .* ended with status 3"),
    ],
)
def test_a_dead_worker_ends_the_walk(read, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(WorkerDiedError, match=message):
        with Loader(read, ORDER, 0, 100, 2) as loader:
            list(loader)
    assert time.monotonic() - begun < 60


_SCRIPT = """
import time
import numpy as np
from alitok_fast.data import DataOrder, Loader

def read(epoch, sample):
    time.sleep(0.01)
    return (np.zeros((4, 4, 3), np.uint8),)

if __name__ == "__main__":
    with Loader(read, DataOrder(100, 10, 0), 0, 10**6, 3) as loader:
        for number, _ in enumerate(loader):
            if number == 3:
                print("going", flush=True)
"""


@pytest.mark.slow
def test_a_script_that_starts_itself_again_is_told(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert ended.returncode == 1 and "a script needs `if __name__ == '__main__':`" in ended.stderr.splitlines()[-1]


def members(session: int) -> list[int]:
    """The processes of a session, zombies left out."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if (
                os.getsid(int(name)) == session
                and Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            ):
                found.append(int(name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_stays_behind(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == b"going\n"
    assert len(members(process.pid)) >= 4
    if number == signal.SIGINT:  # as a terminal sends it
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(60)
    deadline = time.monotonic() + 60
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.stdout.close()
    assert members(process.pid) == []
