"""Large runs: balance, any number of processes, resuming, what lands on disk and what is left alone."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alitok_fast import Pipeline, SamplingParams
from alitok_fast.device import check_device, local_device
from alitok_fast.pipelines.bulk import BulkRun, balanced_labels

LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2]


class Stop(Exception):
    """Where a process ends that is killed."""


@pytest.fixture
def pipe(tiny_folder) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folder)


def start(pipe, output, batch_size=2, labels=LABELS, **settings) -> BulkRun:
    return BulkRun(pipe, labels, output, SamplingParams(**settings), batch_size)


def draw_all(pipe, output, **settings) -> BulkRun:
    run = start(pipe, output, **settings)
    run.sample()
    run.finish()
    return run


def drawn(run: BulkRun) -> np.ndarray:
    return np.stack(run.pictures(range(9)))


def expected(pipe, **settings) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipe(LABELS, **settings).images])


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def stop(*_) -> None:
    raise Stop


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images, per_class, count", [(None, None, 1), (12, None, 4), (None, 5, 5), (6, 2, 2)])
def test_classes_are_exactly_balanced_and_take_turns(images, per_class, count):
    labels = balanced_labels([4, 9, 7], images, per_class)
    assert labels == [[4, 9, 7][i % 3] for i in range(3 * count)]


def test_each_part_of_the_inception_score_has_every_class():
    labels = np.array(balanced_labels(range(1000), 50_000, None))
    for part in labels.reshape(-1, 5000):
        assert (np.bincount(part, minlength=1000) == 5).all()


@pytest.mark.parametrize(
    "classes, images, per_class, message",
    [
        ([4, 7, 9], 10, None, "num_images: expected a multiple of the 3 classes, got 10"),
        ([4, 7, 9], 0, None, "num_images: expected a multiple of the 3 classes, got 0"),
        ([4, 7, 9], 9, 2, "num_images: expected 6, per_class x classes, got 9"),
        ([4, 7, 9], None, 0, "per_class: expected 1 to .*, got 0"),
        ([4, 7, 4], None, 2, "labels: expected each class once, got 4 again; per_class asks for more of each"),
        ([], None, None, "labels: expected at least one class, got none"),
    ],
)
def test_unbalanced_requests(classes, images, per_class, message):
    with pytest.raises(ValueError, match=message):
        balanced_labels(classes, images, per_class)


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_folder_of_pngs(pipe, tmp_path):
    run = start(pipe, tmp_path / "out", seed=3)
    counts = []
    assert run.share == 9
    run.sample(counts.append)
    run.finish()
    assert counts == [2, 2, 2, 2, 1]
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [f"{i}.png" for i in range(9)] + ["manifest.json"]
    assert np.array_equal(drawn(run), expected(pipe, seed=3))
    assert np.array_equal(run.pictures([7, 2]), expected(pipe, seed=3)[[7, 2]])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["seed"], manifest["guidance_scale"], manifest["dtype"]) == (3, 3.0, "float32")
    assert (manifest["labels"], manifest["num_images"]) == (LABELS, 9)


def test_npz(pipe, tmp_path):
    run = draw_all(pipe, tmp_path / "out.npz", batch_size=4)
    with np.load(tmp_path / "out.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], expected(pipe))
        assert arrays["labels"].tolist() == LABELS
    assert sorted(file.name for file in tmp_path.iterdir() if file.name != "tiny") == ["out.npz", "out.npz.json"]
    assert np.array_equal(run.pictures([7, 2]), expected(pipe)[[7, 2]])
    assert start(pipe, tmp_path / "out.npz", batch_size=4).share == 0


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_processes_share_the_work(pipe, tmp_path, monkeypatch, name):
    """Each process draws batches of its own; together they are the run of one process."""
    monkeypatch.setattr(BulkRun, "_wait", lambda self: None)  # test_cli.py has a real group

    def processes() -> list[BulkRun]:
        return [BulkRun(pipe, LABELS, tmp_path / name, SamplingParams(), 2, rank, 3) for rank in range(3)]

    runs = processes()
    assert [run.share for run in runs] == [4, 3, 2]
    for run in runs[::-1]:
        run.sample()
    assert [run.share for run in processes()] == [0, 0, 0]
    runs[0].finish()
    assert np.array_equal(drawn(runs[0]), expected(pipe))


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_a_stopped_run_goes_on_without_repeating(pipe, tmp_path, name):
    run, counts = start(pipe, tmp_path / name), []

    def stop_after_two(count):
        counts.append(count)
        if len(counts) == 2:
            raise Stop

    with pytest.raises(Stop):
        run.sample(stop_after_two)
    with pytest.raises(RuntimeError, match="output: expected 9 images, 5 are missing; run again"):
        run.finish()
    before = files_of(run.output.work)
    again = start(pipe, tmp_path / name)
    assert again.share == 5
    counts.clear()
    again.sample(counts.append)
    assert counts == [2, 2, 1]
    assert before.items() <= files_of(run.output.work).items()
    again.finish()
    assert np.array_equal(drawn(again), expected(pipe))


def test_another_run_in_the_same_place_is_refused(pipe, tmp_path):
    start(pipe, tmp_path / "out").sample()
    for change, message in [
        ({"seed": 1}, "seed: expected 0, got 1"),
        ({"guidance_scale": 9.0}, "guidance_scale: expected 3.0, got 9.0"),
        ({"labels": [*LABELS[:-1], 3]}, r"labels\[8\]: expected 2, got 3"),
        ({"batch_size": 3}, "batch_size: expected 2, got 3"),
        (
            {"batch_size": 3, "top_k": 5, "guidance_scale": 9.0, "labels": LABELS[:6]},
            "guidance_scale: expected 3.0, got 9.0; top_k: expected None, got 5; num_images: expected 9, got 6; "
            r"batch_size: expected 2, got 3; labels\[6\]: expected 0, got None",
        ),
    ]:
        with pytest.raises(ValueError, match=f"settings as in .*manifest.json, got others: {message}$"):
            start(pipe, tmp_path / "out", **change)


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_other_weights_are_refused(pipe, tmp_path, tiny_folder, tiny_generator, tiny_tokenizer, name):
    draw_all(pipe, tmp_path / name)
    shutil.copytree(tiny_folder, tmp_path / "same")
    assert start(Pipeline.from_pretrained(tmp_path / "same"), tmp_path / name).share == 0
    generator, tokenizer = tiny_generator(), tiny_tokenizer()
    with torch.no_grad():
        generator.blocks[1].norm1.weight[3] += 1e-3
        tokenizer.decoder.decoder_embed.weight[2, 1] += 1e-3
    classes = [f"c{i}" for i in range(10)]
    for models, key in [((pipe.tokenizer, generator), "generator"), ((tokenizer, pipe.generator), "tokenizer")]:
        with pytest.raises(ValueError, match=rf"got others: {key}_fingerprint: expected '\w+', got '\w+'$"):
            start(Pipeline(*models, classes), tmp_path / name)


def test_weights_in_8_bits_have_a_fingerprint_too(pipe, tmp_path, tiny_generator):
    from alitok_fast.inference.quantized_generator import QuantizedGenerator

    packed = QuantizedGenerator(tiny_generator(), torch.int8)
    other = tiny_generator()
    with torch.no_grad():
        other.blocks[1].mlp.w1.weight *= 1.5
    found = {
        start(Pipeline(pipe.tokenizer, gen), tmp_path / "o").manifest["generator_fingerprint"]
        for gen in (packed, QuantizedGenerator(other, torch.int8), QuantizedGenerator(tiny_generator(), torch.int8))
    }
    assert len(found) == 2


@pytest.mark.parametrize("text", ['{"seed": 0, "model": "x', "", "[1]"])
def test_a_damaged_manifest_is_named(pipe, tmp_path, text):
    start(pipe, tmp_path / "out").sample()
    (tmp_path / "out" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=".*out/manifest.json: expected the manifest of a run, got "):
        start(pipe, tmp_path / "out")


@pytest.mark.parametrize("name, file", [("out", "3.png"), ("out.npz", "2.npy")])
@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:-5], lambda whole: b"x" * len(whole)])
def test_damaged_images_are_drawn_again(pipe, tmp_path, name, file, damage):
    run = start(pipe, tmp_path / name)
    run.sample()
    file = run.output.work / file
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RuntimeError, match="2 are missing"):
        run.finish()
    again = start(pipe, tmp_path / name)
    assert again.share == 2
    again.sample()
    again.finish()
    assert np.array_equal(drawn(again), expected(pipe))


def test_images_of_another_size_are_drawn_again(pipe, tmp_path):
    run = draw_all(pipe, tmp_path / "out")
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "5.png")
    assert [list(ids) for ids in start(pipe, tmp_path / "out").mine] == [[4, 5]]
    assert run.share == 9


# --- what a kill leaves ---------------------------------------------------------------------------------------------


def test_temporary_files_are_removed(pipe, tmp_path):
    run = start(pipe, tmp_path / "out")
    run.sample()
    for name in (".3.png.alitok-tmp", ".manifest.json.alitok-tmp"):
        (tmp_path / "out" / name).write_text("half")
    others = {".3.png.swp", ".9.png.alitok-tmp", ".hidden", "note.txt"}
    for name in others:
        (tmp_path / "out" / name).write_text("not ours")
    start(pipe, tmp_path / "out").finish()
    assert set(files_of(tmp_path / "out")) == others | {"manifest.json", *(f"{i}.png" for i in range(9))}


@pytest.mark.parametrize("before", ["archive", "manifest", "pieces"])
def test_the_end_of_an_npz_can_be_interrupted(pipe, tmp_path, monkeypatch, before):
    """Killed before the archive, then the manifest moves to its place, or before the pieces are removed."""
    run = start(pipe, tmp_path / "out.npz")
    run.sample()
    with monkeypatch.context() as patch:
        if before == "pieces":
            patch.setattr("alitok_fast.pipelines.outputs.shutil.rmtree", stop)
        else:
            rename = Path.replace
            moved = {"archive": "archive.npz", "manifest": "manifest.json"}[before]
            patch.setattr(Path, "replace", lambda a, b: stop() if a.name == moved else rename(a, b))
        with pytest.raises(Stop):
            run.finish()
    (run.output.work / ".archive.npz.abcdefgh").write_text("half")
    again = start(pipe, tmp_path / "out.npz")
    assert again.share == 0
    again.finish()
    assert set(files_of(tmp_path)) == {"out.npz", "out.npz.json"} and not run.output.work.exists()
    assert np.array_equal(drawn(again), expected(pipe))
    assert start(pipe, tmp_path / "out.npz").share == 0


# --- what is left alone ---------------------------------------------------------------------------------------------


def test_foreign_pictures_are_refused(pipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("no picture")
    assert start(pipe, tmp_path / "out").share == 9
    Image.new("RGB", (16, 16)).save(tmp_path / "out" / "4.png")
    before = files_of(tmp_path / "out")
    with pytest.raises(ValueError, match="output: .*out holds 4.png, but no manifest.json of a run"):
        start(pipe, tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_foreign_files_beside_an_npz_are_left_alone(pipe, tmp_path):
    (tmp_path / "out.json").write_text("a user's")
    draw_all(pipe, tmp_path / "out.npz")
    assert (tmp_path / "out.json").read_text() == "a user's"
    (tmp_path / "x.npz.json").write_text("{}")
    with pytest.raises(ValueError, match="output: expected settings as in .*x.npz.json, got others: guidance_scale: "):
        start(pipe, tmp_path / "x.npz")
    (tmp_path / "y.npz.pieces").mkdir()
    (tmp_path / "y.npz.pieces" / "a").write_text("a user's")
    with pytest.raises(ValueError, match="output: .*y.npz.pieces holds a, but no manifest.json"):
        start(pipe, tmp_path / "y.npz")


@pytest.mark.parametrize("name", ["out", "out.npz"])
@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"guidance_scale": -1.0}, {"temperature": float("nan")}])
def test_wrong_settings_write_nothing(pipe, tmp_path, name, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        start(pipe, tmp_path / name, **wrong).sample()
    assert [file.name for file in tmp_path.iterdir()] == ["tiny"]
    draw_all(pipe, tmp_path / name)


def test_outputs_that_are_none(pipe, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "other.npz").write_text("x")
    (tmp_path / "folder.npz").mkdir()
    for name, message in [
        ("x.zip", "output: expected a folder or a file ending in .npz"),
        ("x.PNG", "output: expected a folder or a file ending in .npz"),
        ("x.tar.gz", "output: expected a folder or a file ending in .npz"),
        ("file", "output: expected a folder, got the file"),
        ("other.npz", "exists without other.npz.json"),
        ("folder.npz", "output: expected a file, got the folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(pipe, tmp_path / name)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        start(pipe, tmp_path / "out", batch_size=0)


def test_names_of_folders_may_have_dots(pipe, tmp_path):
    draw_all(pipe, tmp_path / "xl_cfg1.5")
    assert (tmp_path / "xl_cfg1.5" / "8.png").exists()


@pytest.mark.parametrize("name, file", [("out", "0.png"), ("out.npz", "0.npy")])
def test_a_full_disk_is_named(pipe, tmp_path, name, file, monkeypatch):
    """Files may not grow beyond a few bytes, which fails in the write itself as a full disk does."""
    run = start(pipe, tmp_path / name, batch_size=9)
    run._begin()
    monkeypatch.setattr(run, "_begin", lambda: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{file} was not written: File too large"):
            run.sample()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(files_of(run.output.work)) == {"manifest.json"}


def test_an_error_while_writing_stops_the_run(pipe, tmp_path, monkeypatch):
    def full(path, image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alitok_fast.pipelines.outputs.write_image", full)
    with pytest.raises(OSError, match="No space left"):
        start(pipe, tmp_path / "out").sample()


# --- devices --------------------------------------------------------------------------------------------------------


def test_local_device(monkeypatch):
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (local_device("cuda"), local_device("cuda:1"), local_device("cpu")) == ("cuda:3", "cuda:1", "cpu")


def test_devices_that_are_none(monkeypatch):
    assert check_device("cpu") == "cpu"
    for name in ("gpu", "cuda:", "cuda:x", "cpu:0:1", ""):
        with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got"):
            check_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="device: expected cpu, since this torch (finds no GPU|was built without CUDA)"
    ):
        check_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_device("cuda:1") == "cuda:1"
