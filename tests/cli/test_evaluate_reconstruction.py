"""`alitok-fast evaluate reconstruction`: one file and one table, from one process, several, or one that was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torchvision_here import smooth_pictures
from typer.testing import CliRunner

from alitok_fast.cli.evaluate_reconstruction import HeldOutOptions, reconstruction
from alitok_fast.evaluation.moments import Moments
from alitok_fast.evaluation.reference import Reference, write_reference
from alitok_fast.models import save_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(hub_folder: Path) -> str:
    return f"hub:{hub_folder}:mean"


@pytest.fixture
def tokenizer(tmp_path: Path, tiny_tokenizer) -> Path:
    save_model(tmp_path / "tokenizer", tiny_tokenizer())
    return tmp_path / "tokenizer"


def write_pictures(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    for index, picture in enumerate(smooth_pictures(count, 24).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(folder / f"{index:05}.png")
    return folder


@pytest.fixture
def run():
    """run(*options) -> what was printed."""
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command()(reconstruction)

    def call(*options: object) -> str:
        result = CliRunner().invoke(app, ["--no-progress", "--lpips", "none", *map(str, options)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return call


def test_a_file_and_a_table(tmp_path: Path, run, tokenizer: Path, hub: str) -> None:
    pictures, out = write_pictures(tmp_path / "pictures"), tmp_path / "result.json"
    options = ("--data", pictures, "--tokenizer", tokenizer, "--network", hub, "--out", out)
    said = run(*options)
    result = json.loads(out.read_text())
    assert (
        f"psnr{' ' * (said.splitlines()[1].index('6') - 4)}{result['psnr']:.5g} +- {result['psnr_error']:.2g} dB"
        in said
    )
    for line in ("pictures: 6 pictures in 1 class", "ssim ", "frechet_distance (hub:", "codebook_perplexity ",
                 "psnr_of_mean_error ", "warning: the images are 6, published numbers", f"wrote {out}"):  # fmt: skip
        assert line in said, line
    assert result["format"] == "alitok_fast reconstruction 1" and result["tokenizer"] == str(tokenizer)
    assert result["facts"]["data"]["reading"].startswith("EXIF orientation ignored") and result["versions"].keys() >= {
        "torch",
        "pillow",
    }
    assert sorted(path.name for path in tmp_path.iterdir() if "result" in path.name) == ["result.json"]
    before = out.read_bytes()
    assert run(*options, "--work", tmp_path / "work") and out.read_bytes() == before
    assert (tmp_path / "work" / "features.json").exists()
    assert run(*options[:-2]).splitlines() == said.splitlines()[:-1]  # without --out nothing is written


def test_the_order_of_exif_and_profiles_is_the_published_one(tmp_path: Path, run, tokenizer: Path) -> None:
    """A picture that is to be turned is measured as it is stored."""
    pictures, turned = write_pictures(tmp_path / "pictures"), tmp_path / "turned"
    turned.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in pictures.iterdir():
        Image.open(file).save(turned / file.name, exif=exif)
    results = []
    for folder in (pictures, turned):
        out = tmp_path / f"{folder.name}.json"
        run("--data", folder, "--tokenizer", tokenizer, "--network", "none", "--out", out)
        results.append(json.loads(out.read_text()))
    assert results[0]["psnr"] == results[1]["psnr"] and results[0]["distances"] == {}


@pytest.mark.parametrize(
    ("splits", "expected"),
    [(("train", "val", "test"), "val"), (("train", "test"), "test"), (("train", "validation"), "validation")],
)
def test_pictures_are_of_a_split_that_was_held_out(tmp_path: Path, splits, expected: str) -> None:
    for split in splits:
        write_pictures(tmp_path / "data" / split / "a", 1)
    said: list[str] = []
    assert HeldOutOptions(str(tmp_path / "data")).open(said.append).name == f"data/{expected}"
    assert len(said) == 1
    assert HeldOutOptions(str(tmp_path / "data"), "train").open(said.append).name == "data/train"
    with pytest.raises(ValueError, match="split: expected one of"):
        HeldOutOptions(str(tmp_path / "data"), "other").open(said.append)


def test_training_pictures_are_doubted(tmp_path: Path, run, tokenizer: Path) -> None:
    write_pictures(tmp_path / "data" / "train" / "a")
    options = ("--data", tmp_path / "data", "--tokenizer", tokenizer, "--network", "none", "--out", tmp_path / "o.json")
    assert "warning: the data data/train are a training split" in run(*options)


def test_statistics_of_a_file(tmp_path: Path, run, tokenizer: Path, hub: str) -> None:
    pictures, file = write_pictures(tmp_path / "pictures"), tmp_path / "statistics.safetensors"
    write_reference(file, Reference({"pooled": Moments.of(torch.rand(9, 3))}, {"network": hub}))
    options = ("--data", pictures, "--tokenizer", tokenizer, "--network", hub, "--out", tmp_path / "o.json")
    said = run(*options, "--reference", file)
    assert "warning: the Frechet distance is from the statistics of a file" in said
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(
        ValueError, match="reference: expected statistics of the features of hub:.*, got those of inception"
    ):
        run(*options, "--reference", tmp_path / "adm.npz")


def test_a_file_of_somebody_elses_stays(tmp_path: Path, run, tokenizer: Path) -> None:
    pictures, out = write_pictures(tmp_path / "pictures"), tmp_path / "thesis.json"
    out.write_text('{"mine": 1}')
    options = ("--data", pictures, "--tokenizer", tokenizer, "--network", "none", "--out", out)
    with pytest.raises(ValueError, match="out: .*thesis.json is there, and holds no result of this command"):
        run(*options)
    assert out.read_text() == '{"mine": 1}'
    run(*options, "--force")
    assert json.loads(out.read_text())["images"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "o.txt"), "out: expected a file ending in .json, got o.txt"),
        (("--lpips", "vgg19"), "lpips: expected one of .*none.*, got .*vgg19"),
        (("--encode-dtype", "int3"), "encode_dtype: expected .*, got .*int3"),
        (("--device", "tpu"), "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (("--network", "resnet"), "network: expected one of inception, .*, got 'resnet'"),
        (("--network", "a", "--network", "b", "--weights", "c"), "weights: expected NETWORK=FILE with one of a, b"),
        (("--weights", "1", "--weights", "inception=2"), "weights: expected one file of inception, got 1 and 2"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path: Path, run, tokenizer: Path, options, message: str) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    with pytest.raises(ValueError, match=message):
        run("--data", pictures, "--tokenizer", tokenizer, "--out", tmp_path / "o.json", *options)
    assert not list(tmp_path.glob("o.json*"))


def test_help_loads_no_torch() -> None:
    code = "import sys, alitok_fast.cli.evaluate_reconstruction; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


@pytest.mark.slow
def test_torchrun_and_a_killed_run_give_the_file_of_one_process(tmp_path: Path, tokenizer: Path, hub: str) -> None:
    pictures = write_pictures(tmp_path / "pictures", 2100)  # three files of features
    command = ["-m", "alitok_fast.cli", "evaluate", "reconstruction"]
    program = [sys.executable, *command]
    options = ["--data", pictures, "--tokenizer", tokenizer, "--network", hub, "--lpips", "none", "--no-progress"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]

    def words(command: list[str], name: str) -> list[str]:
        return [*command, *map(str, options), "--out", str(tmp_path / name)]

    def start(command: list[str], name: str) -> str:
        done = subprocess.run(words(command, name), env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    start(program, "one.json")
    said = start(launcher, "two.json")
    assert said.count("2,100 pictures") == 1 and said.count("wrote ") == 1
    killed = subprocess.Popen(words(program, "killed.json"), env=environment, stdout=subprocess.DEVNULL)
    first = tmp_path / "killed.json.work" / "00000000.safetensors"
    for _ in range(1200):
        if first.exists():
            break
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL and first.exists() and not (tmp_path / "killed.json").exists()
    start(launcher, "killed.json")
    one, two, resumed = ((tmp_path / f"{name}.json").read_bytes() for name in ("one", "two", "killed"))
    assert one == two == resumed and json.loads(one)["distances"][hub]["frechet_distance"] > 0
