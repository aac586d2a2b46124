"""The command line: outputs, resuming, several processes, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alitok_fast import Pipeline, load_tokenizer, save_model
from alitok_fast.cli import main
from alitok_fast.pipelines.bulk import BulkRun, only_writer
from alitok_fast.storage.images import CAPTION, MARGIN

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny models, and processes beside each other


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit status, standard output, standard error)."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alitok-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


def succeed(result: tuple[int, str, str]) -> str:
    status, out, err = result
    assert status == 0, err
    return out


def photo(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    rows, columns = np.mgrid[: size[1], : size[0]]
    Image.fromarray(np.stack([rows * 5 % 256, columns * 6 % 256, rows + columns], -1).astype(np.uint8)).save(path)
    return path


# --- sample ---------------------------------------------------------------------------------------------------------


def test_grid_and_its_metadata(run, tiny_folder, tmp_path):
    out = succeed(run("sample", "c1", 4, "--per-class", 3, "--model", tiny_folder, "--grid", tmp_path / "g.png"))
    assert "wrote" in out
    with Image.open(tmp_path / "g.png") as sheet:
        assert sheet.width > sheet.height  # a row of three for each class
    metadata = json.loads((tmp_path / "g.png.json").read_text())
    assert (metadata["labels"], metadata["image_ids"]) == ([1, 1, 1, 4, 4, 4], [0, 2, 4, 1, 3, 5])
    assert metadata["seed"] == 0 and metadata["guidance_scale"] == 3.0


def test_a_grid_is_the_same_with_and_without_an_output(run, tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("a user's")
    call = ("sample", "c1", 4, "--per-class", 3, "--model", tiny_folder, "--batch-size", 4)
    succeed(run(*call, "--grid", tmp_path / "a.png"))
    succeed(run(*call, "--grid", tmp_path / "b.png", "--out", tmp_path / "p"))
    succeed(run(*call, "--grid", tmp_path / "c.png", "--out", tmp_path / "p.npz"))
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert np.array_equal(a, b) and np.array_equal(a, c)
    a, b, c = (json.loads((tmp_path / f"{name}.png.json").read_text()) for name in "abc")
    assert b == c and a.items() <= b.items()
    assert (tmp_path / "a.json").read_text() == "a user's"

    def loaded(*_):
        raise AssertionError("without a grid, nobody needs the images again")

    monkeypatch.setattr(BulkRun, "pictures", loaded)
    succeed(run(*call, "--out", tmp_path / "p.npz"))


def test_folder_holds_what_the_pipeline_draws(run, tiny_folder, tmp_path):
    arguments = ("--seed", 7, "--guidance-scale", 1.5, "--guidance-power", 0.8, "--temperature", 0.9, "--top-k", 9)
    succeed(run("sample", "c2", "c3", "--model", tiny_folder, "--out", tmp_path / "p", *arguments, "--top-p", 0.95))
    settings = dict(seed=7, guidance_scale=1.5, guidance_power=0.8, temperature=0.9, top_k=9, top_p=0.95)
    expected = Pipeline.from_pretrained(tiny_folder)([2, 3], **settings).images
    for i, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "p" / f"{i}.png")), np.asarray(image))
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert {key: manifest[key] for key in settings} == settings


def test_npz_of_all_classes_with_a_grid(run, tiny_folder, tmp_path):
    out, grid = tmp_path / "x.npz", tmp_path / "g.png"
    succeed(run("sample", "--num-images", 20, "--model", tiny_folder, "--out", out, "--grid", grid, "--batch-size", 8))
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (20, 16, 16, 3)
        assert np.bincount(arrays["labels"]).tolist() == [2] * 10
    assert grid.exists()


@pytest.mark.slow
def test_a_killed_run_goes_on(tiny_folder, tmp_path):
    """SIGKILL in the middle; the same command again ends with the images of an undisturbed run, and nothing else."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def command(out: Path) -> list[str]:
        options = ["--model", str(tiny_folder), "--out", str(out), "--per-class", "6", "--batch-size", "2"]
        return [sys.executable, "-m", "alitok_fast.cli", "sample", *options, "--no-progress"]

    process = subprocess.Popen(command(broken), cwd=ROOT, env=ONE_THREAD)
    while len(list(broken.glob("*.png"))) < 6:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    begun = {file: file.stat().st_mtime_ns for file in broken.glob("[0-9]*.png")}
    assert 6 <= len(begun) < 60
    (broken / ".07.png.alitok-tmp").write_bytes(b"half")  # such a one stays when the kill meets a write
    for out in (broken, whole):
        subprocess.run(command(out), cwd=ROOT, check=True, capture_output=True, env=ONE_THREAD)
    names = [f"{i:02d}.png" for i in range(60)]
    assert sorted(file.name for file in broken.iterdir()) == [*names, "manifest.json"]
    assert all((broken / name).read_bytes() == (whole / name).read_bytes() for name in names)
    kept = [file for file, written in begun.items() if file.stat().st_mtime_ns == written]
    assert len(kept) >= len(begun) // 2 * 2 - 2  # all but the batch that was being written


def test_ctrl_c_is_one_line(run, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("alitok_fast.info.report", interrupted)
    assert run("info") == (130, "", "alitok-fast: interrupted\n")


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(run, tiny_folder, tmp_path):
    options = ["--model", str(tiny_folder), "--per-class", "2", "--batch-size", "3", "--no-progress"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "alitok_fast.cli", "sample", *options, "--out", str(tmp_path / "two.npz")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("20 images in") == 1
    succeed(run("sample", *options, "--out", tmp_path / "one.npz"))
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"])
        assert np.array_equal(one["labels"], two["labels"])


# --- reconstruct, convert, info -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "two.npz"])
def test_one_of_two_processes_is_killed(run, tiny_folder, tmp_path, name):
    """torchrun ends the other; the same command again gives the images of one process."""
    options = ["--model", str(tiny_folder), "--per-class", "6", "--batch-size", "2", "--no-progress", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "alitok_fast.cli", "sample", *options, str(tmp_path / name)]
    work = tmp_path / (f"{name}.pieces" if name.endswith("npz") else name)
    process = subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    while len(list(work.glob("[0-9]*"))) < 4:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    worker = min(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    os.kill(worker, signal.SIGKILL)
    assert "SIGKILL" in process.communicate()[1] and process.returncode != 0
    assert 4 <= len(list(work.glob("[0-9]*"))) < (30 if name.endswith("npz") else 60)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
    assert result.returncode == 0, result.stderr
    succeed(run("sample", *options, tmp_path / f"one_{name}"))
    if name.endswith("npz"):
        with np.load(tmp_path / name) as two, np.load(tmp_path / f"one_{name}") as one:
            assert np.array_equal(two["arr_0"], one["arr_0"]) and np.array_equal(two["labels"], one["labels"])
        assert not work.exists()
    else:
        two, one = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in (name, f"one_{name}"))
        assert two == one


def test_two_commands_do_not_write_to_one_output(run, tiny_folder, tmp_path):
    with only_writer(tmp_path / "o"):
        status, _, err = run("sample", "--model", tiny_folder, "--out", tmp_path / "o")
    assert status == 2 and err.count("\n") == 1 and "o, which another process is writing" in err
    succeed(run("sample", "--model", tiny_folder, "--out", tmp_path / "o"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("options, tokens", [((), 21), (("--tile",), 21 * 2)])
def test_reconstruct(run, tiny_folder, tmp_path, options, tokens):
    out = succeed(
        run("reconstruct", photo(tmp_path / "a.png"), "--model", tiny_folder, "--out", tmp_path / "s.png", *options)
    )
    assert re.search(rf"a.png: PSNR \d+\.\d\d dB, {tokens} tokens", out)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > sheet.height


@pytest.mark.slow
def test_reconstruct_photographs_with_weights_in_the_released_format(run, golden, recipe, tmp_path):
    """Real photographs through weights of the full size, read from a .pth file without a word about their size."""
    torch.save(recipe("tokenizer"), tmp_path / "alitok_tokenizer.pth")
    with np.load(golden / "tokenizer.npz") as outputs:
        Image.fromarray(outputs["photos"][0]).save(tmp_path / "astronaut.png")
        expected = outputs["reconstruction"][0].astype(np.float32).transpose(1, 2, 0)
    arguments = ("--model", tmp_path / "alitok_tokenizer.pth", "--out", tmp_path / "s.png")
    out = succeed(run("reconstruct", tmp_path / "astronaut.png", *arguments))
    assert re.search(r"astronaut.png: PSNR \d+\.\d\d dB, 273 tokens", out)
    with Image.open(tmp_path / "s.png") as sheet:
        right = np.asarray(sheet)[-256 - 4 : -4, -256 - 4 : -4]
    assert np.abs(right / 255 - expected).max() < 1.5 / 255  # truncated to eight bits


def test_unreadable_photographs_are_named(run, tiny_folder, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    arguments = ("reconstruct", tmp_path / "bad.jpg", photo(tmp_path / "a.png"), "--model", tiny_folder)
    status, _, err = run(*arguments, "--out", tmp_path / "s.png")
    assert status == 2 and "bad.jpg: expected a readable image" in err and err.count("\n") == 1
    assert not (tmp_path / "s.png").exists()
    out = succeed(run(*arguments, "--out", tmp_path / "s.png", "--on-error", "skip"))
    assert "a.png" in out and "bad.jpg" not in out


def test_convert_there_and_back(run, tiny_folder, tmp_path, tiny_tokenizer):
    succeed(run("convert", tiny_folder / "tokenizer", tmp_path / "t.safetensors"))
    succeed(run("convert", tiny_folder, tmp_path / "half", "--kind", "tokenizer", "--dtype", "bfloat16"))
    description = json.loads((tmp_path / "half" / "config.json").read_text())
    assert description["dtype"] == "bfloat16"
    expected = tiny_tokenizer().state_dict()
    for path in (tmp_path / "t.safetensors", tmp_path / "half"):
        state = load_tokenizer(path, config=tiny_tokenizer().config).state_dict()
        assert all(torch.allclose(state[name], value, atol=1e-2, rtol=1e-2) for name, value in expected.items())


def test_convert_keeps_provenance(run, tiny_folder, tmp_path):
    succeed(run("convert", tiny_folder / "generator", tmp_path / "g"))
    assert json.loads((tmp_path / "g" / "config.json").read_text())["provenance"]["classes"][3] == "c3"


def test_info(run):
    out = succeed(run("info"))
    assert torch.__version__ in out


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("smaple",), "No such command 'smaple'"),
        (("sample", "--sead", "1"), "--sead"),
        (("sample", "--seed", "x", "--grid", "g.png"), "Invalid value for '--seed'"),
        (("sample",), "expected --out, --grid or both, got neither"),
        (("sample", "--grid", "g.txt"), "path: expected a file ending in .png, .jpg"),
        (("sample", "--grid", "no/g.png"), "expected a file in a folder that exists, got no/g.png"),
        (
            ("sample", "--grid", "g.png", "--model", "nowhere"),
            "or a hub repository id, got 'nowhere', which does not exist",
        ),
        (("sample", "--grid", "g.png", "--model", "b"), "got the preset 'b', whose weights are not shipped"),
        (("sample", "--grid", "g.png", "--dtype", "int3", "--model", "TINY"), "dtype: expected one of float32"),
        (("sample", "--grid", "g.png", "--decode-dtype", "int4", "--model", "TINY"), "decode_dtype: expected one of"),
        (("watch", "1", "--stage1", "TINY", "--out", "g.png", "--model", "TINY"), "stage1: expected a causal decoder"),
        (("sample", "c1", "1", "--grid", "g.png", "--model", "TINY"), "labels: expected each class once, got 1 again"),
        (("sample", "--seed", str(2**64), "--grid", "g.png"), "seed: expected an integer in [-2**63, 2**63)"),
        (("sample", "--device", "gpu", "--grid", "g.png"), "device: expected cpu, cuda or cuda:N, got 'gpu'"),
        (
            ("sample", "sofa", "--grid", "g.png", "--model", "TINY"),
            "labels: expected a number in 0..9 or a class name, such as c0",
        ),
        (("sample", "12", "--grid", "g.png", "--model", "TINY"), "labels: expected values in [0, 10), got 12"),
        (
            ("sample", "--num-images", "7", "--grid", "g.png", "--model", "TINY"),
            "expected a multiple of the 10 classes",
        ),
        (("sample", "--out", "x.zip", "--model", "TINY"), "output: expected a folder or a file ending in .npz"),
        (("sample", "--out", "o", "--top-p", "2", "--model", "TINY"), "top_p: expected None or a number in (0, 1]"),
        (
            ("sample", "--out", "o", "--top-k", "0", "--model", "TINY"),
            "top_k: expected None or an integer in [1, 2**63)",
        ),
        (
            ("sample", "--out", "o", "--guidance-scale", "-1", "--model", "TINY"),
            "guidance_scale: expected a number in [0, 1e+30], got -1.0",
        ),
        (("sample", "--out", "o", "--weight-dtype", "float16", "--model", "TINY"), "weight_dtype: expected one of"),
        (
            ("sample", "--out", "o", "--num-images", str(10**30), "--model", "TINY"),
            "num_images: expected at most 100000000",
        ),
        (("sample", "--out", "o", "--batch-size", "0", "--model", "TINY"), "Invalid value for '--batch-size'"),
        (("reconstruct", "absent.png", "--out", "s.png", "--model", "TINY"), "absent.png: expected a readable image"),
        (("reconstruct", "--out", "s.png"), "Missing argument"),
        (("convert", "TINY", "x.zip"), "target: expected a folder, or a file ending in .safetensors"),
        (("convert", "TINY", "x"), "kind: expected 'tokenizer' or 'generator'"),
        (("convert", "TINY", "out", "--kind", "vocoder"), "kind: expected 'tokenizer' or 'generator', got 'vocoder'"),
    ],
)
def test_mistakes_are_one_line(run, tiny_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*(str(tiny_folder) if argument == "TINY" else argument for argument in arguments))
    assert status == 2
    assert err.startswith("alitok-fast: ") and err.count("\n") == 1
    assert message in err
    assert [file.name for file in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("text", ["labels: expected a batch whose cache fits in memory", ""])
def test_too_little_memory_is_one_line(run, tiny_folder, tmp_path, monkeypatch, text):
    def full(*_, **__):
        raise MemoryError(text)

    monkeypatch.setattr(Pipeline, "__call__", full)
    status, _, err = run("sample", 1, "--grid", tmp_path / "g.png", "--model", tiny_folder)
    assert (status, err) == (1, f"alitok-fast: {text or 'out of memory'}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a torch without a GPU")
@pytest.mark.parametrize(
    "command", ["sample --grid g.png", "reconstruct a.png --out s.png", "tokenize --data . --out t"]
)
def test_a_gpu_that_is_not_there_is_one_line(run, command):
    status, _, err = run(*command.split(), "--device", "cuda")
    assert (
        status == 2 and err.startswith("alitok-fast: device: expected cpu, since this torch ") and err.count("\n") == 1
    )


def test_nan_weights_are_one_line(run, tiny_folder, tmp_path, tiny_generator):
    gen = tiny_generator()
    gen.output.weight.data[0, 0] = float("nan")
    save_model(tiny_folder / "generator", gen)
    status, _, err = run("sample", 1, "--grid", tmp_path / "g.png", "--model", tiny_folder)
    assert status == 1
    assert "expected finite logits, got NaN or infinity" in err and err.count("\n") == 1


# --- complete, watch ------------------------------------------------------------------------------------------------


def test_photographs_are_completed(run, tiny_folder, tmp_path):
    photos = [photo(tmp_path / "a.png"), photo(tmp_path / "b.png", (30, 40))]
    out = tmp_path / "sheet.png"
    call = ("complete", *photos, "--label", "c2", "--variants", 2, "--model", tiny_folder, "--out", out)
    assert f"wrote {out} and {out}.json" in succeed(run(*call, "--seed", 5))
    metadata = json.loads((tmp_path / "sheet.png.json").read_text())
    assert (metadata["labels"], metadata["image_ids"], metadata["seed"]) == ([2] * 4, [0, 1, 2, 3], 5)
    assert (metadata["rows"], metadata["variants"], metadata["photos"]) == (2, 2, [str(photo) for photo in photos])
    succeed(run(*call))
    half = np.asarray(Image.open(out))
    succeed(run(*call, "--rows", 4))
    whole = np.asarray(Image.open(out))
    assert half.shape == whole.shape and not np.array_equal(half, whole)
    half, whole = (np.split(sheet[MARGIN + CAPTION :][:96, MARGIN:], 4, axis=1) for sheet in (half, whole))
    assert np.array_equal(half[0], whole[0]) and np.array_equal(whole[0], whole[1])  # the photograph, given whole
    assert np.array_equal(half[1][:48], whole[1][:48]) and (half[1][48:] == 255).all()
    assert np.array_equal(whole[2], whole[3]) and not np.array_equal(half[2], half[3])  # completed
    status, _, err = run(*call, "--rows", 5)
    assert status == 2 and "rows: expected 0..4, the rows of patches in an image, got 5" in err


@pytest.fixture
def stage1_folder(tiny_folder, tiny_tokenizer, tmp_path) -> Path:
    """A causal tokenizer with the codes of the pipeline in `tiny_folder`."""
    stage1 = tiny_tokenizer(1)
    stage1.quantize.load_state_dict(load_tokenizer(tiny_folder).quantize.state_dict(), strict=False)
    return save_model(tmp_path / "stage1", stage1)


def test_pictures_are_watched(run, tiny_folder, stage1_folder, tmp_path):
    call = ("watch", "c1", 4, 5, "--model", tiny_folder, "--stage1", stage1_folder, "--out")
    succeed(run(*call, tmp_path / "growing.gif"))
    succeed(run(*call, tmp_path / "growing.png"))
    with Image.open(tmp_path / "growing.gif") as film:
        assert film.n_frames == 5  # four rows of patches, then the finished picture
    with Image.open(tmp_path / "growing.png") as strip:
        assert getattr(strip, "n_frames", 1) == 1 and strip.width > strip.height
    metadata = json.loads((tmp_path / "growing.gif.json").read_text())
    assert metadata == json.loads((tmp_path / "growing.png.json").read_text())
    assert (metadata["labels"], metadata["image_ids"], metadata["seed"]) == ([1, 4, 5], [0, 1, 2], 0)
    assert metadata["stage1"] == str(stage1_folder)


def test_the_demo_can_be_watched(run, tmp_path):
    succeed(run("watch", "bag", "--out", tmp_path / "bag.gif"))
    with Image.open(tmp_path / "bag.gif") as film:
        assert film.n_frames == 9


def test_a_model_without_a_causal_tokenizer_is_named(run, tiny_folder, tmp_path):
    status, _, err = run("watch", 1, "--model", tiny_folder, "--out", tmp_path / "g.gif")
    assert status == 2 and "stage1: expected a causal tokenizer, got none" in err


def test_another_codebook_is_refused(run, tiny_folder, tiny_tokenizer, tmp_path):
    other = tiny_tokenizer(1)
    torch.nn.init.normal_(other.quantize.embedding.weight)
    stage1 = save_model(tmp_path / "other", other)
    status, _, err = run("watch", 1, "--model", tiny_folder, "--stage1", stage1, "--out", tmp_path / "g.gif")
    assert status == 2 and "stage1: expected the tokenizer whose codebook the pipeline has" in err


@pytest.mark.parametrize(
    "command",
    "info sample complete watch reconstruct convert tokenize train train_tokenizer train_generator".split(),
)
def test_help_shows_examples(run, command):
    out = succeed(run(*command.split("_"), "--help"))
    assert f"alitok-fast {command.replace('_', ' ')}" in out.split("Options")[0].split("Example")[1]


def test_help_lists_the_commands(run):
    out = succeed(run("--help"))
    for command in ("info", "sample", "complete", "watch", "reconstruct", "convert", "tokenize", "train"):
        assert re.search(rf"^\s+{command}\b", out, re.MULTILINE)
