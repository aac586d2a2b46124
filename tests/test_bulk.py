"""Large runs: balance, any number of processes, resuming, what lands on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from alitok_fast import Pipeline
from alitok_fast.bulk import BulkRun, balanced_labels, local_device

LABELS = [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.fixture
def pipe(tiny_folder) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folder)


def start(pipe, output, batch_size=2, labels=LABELS, **settings) -> BulkRun:
    return BulkRun(pipe, labels, output, pipe.settings(**settings), batch_size)


def expected(pipe, **settings) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipe(LABELS, **settings).images])


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("images, per_class, count", [(None, None, 1), (12, None, 4), (None, 5, 5), (6, 2, 2)])
def test_classes_are_exactly_balanced(images, per_class, count):
    labels = balanced_labels([4, 7, 9], images, per_class)
    assert {label: labels.count(label) for label in labels} == {4: count, 7: count, 9: count}


@pytest.mark.parametrize(
    "images, per_class, message",
    [
        (10, None, "num_images: expected a multiple of the 3 classes, got 10"),
        (0, None, "num_images: expected a multiple of the 3 classes, got 0"),
        (9, 2, "num_images: expected 6, per_class x classes, got 9"),
        (None, 0, "per_class: expected at least 1, got 0"),
    ],
)
def test_unbalanced_requests(images, per_class, message):
    with pytest.raises(ValueError, match=message):
        balanced_labels([4, 7, 9], images, per_class)


def test_folder_of_pngs(pipe, tmp_path):
    run = start(pipe, tmp_path / "out", seed=3)
    drawn = []
    assert run.share == 9
    run.draw(drawn.append)
    run.finish()
    assert drawn == [2, 2, 2, 2, 1]
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [f"{i}.png" for i in range(9)] + ["manifest.json"]
    assert np.array_equal(np.stack(run.pictures()), expected(pipe, seed=3))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["seed"], manifest["guidance_scale"], manifest["dtype"]) == (3, 3.0, "float32")
    assert (manifest["labels"], manifest["num_images"]) == (LABELS, 9)


def test_npz(pipe, tmp_path):
    run = start(pipe, tmp_path / "out.npz", batch_size=4)
    run.draw()
    run.finish()
    with np.load(tmp_path / "out.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], expected(pipe))
        assert arrays["labels"].tolist() == LABELS
    assert sorted(file.name for file in tmp_path.iterdir() if file.name != "tiny") == ["out.json", "out.npz"]
    assert np.array_equal(np.stack(run.pictures()), expected(pipe))
    assert start(pipe, tmp_path / "out.npz", batch_size=4).share == 0


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_processes_share_the_work(pipe, tmp_path, monkeypatch, name):
    """Each process draws batches of its own; together they are the run of one process."""
    monkeypatch.setattr(BulkRun, "_wait", lambda self: None)  # test_cli.py has a real group
    runs = [BulkRun(pipe, LABELS, tmp_path / name, pipe.settings(), 2, rank, 3) for rank in range(3)]
    assert [run.share for run in runs] == [4, 3, 2]
    for run in runs[::-1]:
        run.draw()
    assert [run.share for run in runs] == [0, 0, 0]
    runs[0].finish()
    assert np.array_equal(np.stack(runs[0].pictures()), expected(pipe))


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_a_stopped_run_goes_on_without_repeating(pipe, tmp_path, name):
    class Stop(Exception):
        pass

    run, drawn = start(pipe, tmp_path / name), []

    def stop_after_two(count):
        drawn.append(count)
        if len(drawn) == 2:
            raise Stop

    with pytest.raises(Stop):
        run.draw(stop_after_two)
    with pytest.raises(RuntimeError, match="output: expected 9 images, 5 are missing; run again"):
        run.finish()
    before = files_of(run.output.work)
    again = start(pipe, tmp_path / name)
    assert again.share == 5
    drawn.clear()
    again.draw(drawn.append)
    assert drawn == [2, 2, 1]
    assert before.items() <= files_of(run.output.work).items()
    again.finish()
    assert np.array_equal(np.stack(again.pictures()), expected(pipe))


def test_another_run_in_the_same_place_is_refused(pipe, tmp_path):
    start(pipe, tmp_path / "out").draw()
    for change, message in [
        ({"seed": 1}, "another seed: 0, now 1"),
        ({"guidance_scale": 9.0}, "another guidance_scale: 3.0, now 9.0"),
        ({"labels": LABELS[:-1] + [3]}, "another labels: other labels"),
        ({"batch_size": 3}, "another batch_size: 2, now 3"),
    ]:
        with pytest.raises(ValueError, match=f"output: expected settings as in .*manifest.json, got {message}"):
            start(pipe, tmp_path / "out", **change)


def test_outputs_that_are_none(pipe, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "other.npz").write_text("x")
    for name, message in [
        ("x.zip", "output: expected a folder or a file ending in .npz"),
        ("file", "output: expected a folder, got the file"),
        ("other.npz", "exists without other.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(pipe, tmp_path / name)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        start(pipe, tmp_path / "out", batch_size=0)


def test_an_error_while_writing_stops_the_run(pipe, tmp_path, monkeypatch):
    def full(path, image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alitok_fast.bulk.write_image", full)
    with pytest.raises(OSError, match="No space left"):
        start(pipe, tmp_path / "out").draw()


def test_local_device(monkeypatch):
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (local_device("cuda"), local_device("cuda:1"), local_device("cpu")) == ("cuda:3", "cuda:1", "cpu")
