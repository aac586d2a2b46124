"""examples/: each runs as its first lines say, alone and as several processes, and does what docs/examples.md says."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision_here import import_or_skip
from typer.main import get_command

from alitok_fast import load_generator, load_tokenizer
from alitok_fast.cli.app import app
from alitok_fast.config import tokenizer_preset
from alitok_fast.data import validate_token_cache
from alitok_fast.device import cpu_multiplies_bf16
from alitok_fast.pipelines.class_names import class_names_of
from alitok_fast.storage.files import read_json

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SLURM = EXAMPLES / "slurm_train.sh"
LOOPS = ("pytorch_loop.py", "accelerate_loop.py", "lightning_module.py")
FILES = sorted(path for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".sh"))
PYTHON = [path for path in FILES if path.suffix == ".py"]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LIMIT = 600  # seconds, after which it hangs


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """24 pictures of 96 x 96 in two classes: pieces of a dark photograph and of a bright one."""
    data = pytest.importorskip("skimage.data")
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, picture in (("night", data.hubble_deep_field()), ("page", data.page())):
        (folder / name).mkdir()
        for number in range(12):
            left, top = rng.integers(picture.shape[1] - 96), rng.integers(picture.shape[0] - 96)
            piece = Image.fromarray(picture[top : top + 96, left : left + 96]).convert("RGB")
            piece.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """This checkout's package in one thread, and a torchvision that can be imported: lightning does so."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text("import torchvision_here\ntorchvision_here.import_or_skip('torchvision')\n")
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "SITE": str(site)}


@pytest.fixture
def run(environment, photos):
    """run(*words, timeout=...) -> what Python prints with these arguments and the photographs as --data."""

    def run(*words: object, timeout: float = LIMIT) -> str:
        command = [sys.executable, *map(str, words), "--data", str(photos)]
        path = environment["PYTHONPATH"]
        if "lightning_module.py" in str(words[0]):
            import_or_skip("lightning")
            path = f"{environment['SITE']}:{path}"
        done = subprocess.run(
            command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def losses(text: str) -> list[float]:
    """Of the lines that the loops print, which count the steps from 1 on."""
    found = re.findall(r"^step (\d+): loss ([\d.]+)$", text, re.MULTILINE)
    assert [int(step) for step, _ in found] == list(range(1, len(found) + 1))
    return [float(loss) for _, loss in found]


def logged_losses(folder: Path) -> list[float]:
    """Of the log that Lightning writes."""
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def assert_trained(folder: Path) -> None:
    """A stage-1 tokenizer of the demo's sizes, whose rare codes lie where the features are and not where they began."""
    tokenizer = load_tokenizer(folder)
    assert tokenizer.config.stage == 1
    assert tokenizer.config.encoder_width == tokenizer_preset("demo").encoder_width
    first = 1 / tokenizer.config.codebook_size
    assert tokenizer.quantize.codebook.abs().amax(1).min() > 5 * first
    assert float(tokenizer.quantize.embed_prob.sum()) > 0


# ---- the loops ----

SETTINGS = ("--steps", 6, "--lr", "3e-4")  # each of all 24 pictures
# In bfloat16, their default, where the CPU multiplies in it; where it does not, that takes two to five times as long.
ACCELERATE, LIGHTNING = ((), ()) if cpu_multiplies_bf16() else (("--precision", "no"), ("--precision", "32-true"))


def test_pytorch_loop(run, tmp_path):
    found = losses(run(EXAMPLES / "pytorch_loop.py", "--out", tmp_path, *SETTINGS, "--batch-size", 24))
    assert len(found) == 6 and found[-1] < 0.8 * found[0]
    assert_trained(tmp_path)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(run, tmp_path):
    """With accumulation in the one, and none in the two: gradients and clustering are of the whole batch."""
    settings = (EXAMPLES / "pytorch_loop.py", "--steps", 6, "--lr", "1e-4", "--precision", "fp32")
    one = losses(run(*settings, "--out", tmp_path / "one", "--batch-size", 12, "--accumulate", 2))
    two = losses(run(*TORCHRUN, *settings, "--out", tmp_path / "two", "--batch-size", 24))
    both = losses(run(*TORCHRUN, *settings, "--out", tmp_path / "both", "--batch-size", 12, "--accumulate", 2))
    assert len(one) == 6
    for several in (two, both):  # printed to 1e-6; later on, rounding may choose another code
        assert several[:3] == pytest.approx(one[:3], abs=2e-6)
        assert several == pytest.approx(one, rel=5e-3)
    codebooks = [load_tokenizer(tmp_path / name).quantize.codebook for name in ("one", "two", "both")]
    for codebook in codebooks[1:]:
        same = (codebook - codebooks[0]).abs().amax(1) < 1e-3
        assert same.float().mean() > 0.9, "but for codes whose closest feature was nearly another"


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_compiled(name, run, tmp_path):
    """It trains, and the plain loop's steps are those without the compiler. Inductor may find the machine busy."""
    if name == "accelerate_loop.py":
        pytest.importorskip("accelerate")
    precision = {"accelerate_loop.py": ACCELERATE, "lightning_module.py": LIGHTNING}.get(name, ())
    settings = (EXAMPLES / name, "--steps", 2, "--batch-size", 4, *precision)
    if name == "pytorch_loop.py":
        settings += ("--precision", "fp32")
        eager = losses(run(*settings, "--out", tmp_path / "eager"))
        assert losses(run(*settings, "--out", tmp_path / "out", "--compile", timeout=400)) == pytest.approx(
            eager, rel=1e-4
        )
    else:
        run(*settings, "--out", tmp_path / "out", "--compile", timeout=400)
    load_tokenizer(tmp_path / "out" / ("model" if name == "lightning_module.py" else ""))


def test_accelerate_loop(run, tmp_path):
    pytest.importorskip("accelerate")
    settings = (*SETTINGS, *ACCELERATE, "--batch-size", 12, "--accumulate", 2)
    found = losses(run(EXAMPLES / "accelerate_loop.py", "--out", tmp_path, *settings))
    assert len(found) == 6 and found[-1] < 0.8 * found[0]
    assert_trained(tmp_path)


@pytest.mark.slow
def test_accelerate_loop_in_two_processes(run, tmp_path):
    pytest.importorskip("accelerate")
    settings = (*SETTINGS, *ACCELERATE, "--batch-size", 6, "--accumulate", 2)
    found = losses(run(*TORCHRUN, EXAMPLES / "accelerate_loop.py", "--out", tmp_path, *settings))
    assert len(found) == 6, "one process speaks for both"
    assert found[-1] < 0.8 * found[0]
    assert_trained(tmp_path)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_lightning_module(devices, run, tmp_path):
    settings = (*SETTINGS, *LIGHTNING, "--batch-size", 12 // devices, "--accumulate", 2)
    settings += ("--devices", devices, "--log-every", 1)
    run(EXAMPLES / "lightning_module.py", "--out", tmp_path, *settings)
    found = logged_losses(tmp_path)
    assert len(found) == 6 and found[-1] < 0.8 * found[0]
    assert_trained(tmp_path / "model")


# ---- fine-tuning ----


def test_finetune_generator(run, tmp_path):
    settings = ("--steps", 4, "--batch-size", 8, "--log-every", 1, "--per-class", 3, "--guidance-scale", 0, 2)
    printed = run(EXAMPLES / "finetune_generator.py", "--out", tmp_path, *settings)
    assert "24 pictures in 2 classes" in printed
    cache = validate_token_cache(tmp_path / "tokens")
    assert cache.tokens.shape == (24, 10, load_tokenizer("demo").config.num_tokens)
    model = tmp_path / "run" / "model"
    assert list(class_names_of(str(model))) == ["night", "page"]
    began, ended = load_generator("demo").state_dict(), load_generator(model).state_dict()
    moved = torch.cat([(ended[name] - began[name]).flatten() for name in began]).abs().max()
    assert 0 < moved < 0.01, "it goes on from the demo's weights"
    for scale in (0, 2):
        with Image.open(tmp_path / f"samples_guidance_{scale}.png") as sheet:
            assert sheet.width // 3 == pytest.approx(100, abs=5) and sheet.height > 2 * 96


@pytest.mark.slow
def test_fine_tuned_classes_are_told_apart_and_runs_go_on(run, tmp_path):
    settings = (EXAMPLES / "finetune_generator.py", "--out", tmp_path, "--batch-size", 16, "--guidance-scale", 2)
    run(*settings, "--steps", 60)
    run(*settings, "--steps", 80)
    assert read_json(tmp_path / "run" / "model" / "config.json")["provenance"]["step"] == 80
    with Image.open(tmp_path / "samples_guidance_2.png") as sheet:
        night, page = np.array_split(np.asarray(sheet.convert("L"), np.float64), 2)
    assert night.mean() < page.mean() - 40


# ---- Slurm ----


def command_of(script: Path) -> list[str]:
    """The words that srun starts, from torchrun on."""
    text = re.sub(r"\\\n\s*", " ", script.read_text())
    (line,) = re.findall(r"^srun .*$", text, re.MULTILINE)
    return shlex.split(re.sub(r"\$\(\(.*?\)\)|\$\(.*?\)", "x", line))


def test_the_slurm_script_is_bash():
    assert subprocess.run(["bash", "-n", str(SLURM)], capture_output=True, text=True).stderr == ""
    assert SLURM.stat().st_mode & 0o111


def test_options_in_the_slurm_script_exist():
    from torch.distributed.run import get_args_parser

    words = command_of(SLURM)
    launcher, ours = words[words.index("torchrun") + 1 :], words[words.index("alitok_fast.cli") + 1 :]
    launcher = launcher[: launcher.index("-m")]
    known = set(re.findall(r"--[\w-]+", get_args_parser().format_help()))
    assert {word for word in launcher if word.startswith("--")} <= known
    assert ours[:2] == ["train", "tokenizer"]
    command = get_command(app).commands["train"].commands["tokenizer"]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in ours if word.startswith("--")} <= known
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1", "torchrun starts the processes of a node"
    assert asked["signal"].startswith("TERM@") and "requeue" in asked


@pytest.fixture
def submit(tmp_path, environment, photos):
    """submit(*words) -> the script as Slurm would start it on this machine alone, for two processes on the CPU.

    srun leaves its process number, which is then torchrun's, in `agent`, and scontrol the jobs to queue in `queue`.
    """
    commands = {
        "srun": 'while [ "$1" != torchrun ]; do shift; done\necho $$ > agent\nexec "$@"',
        "torchrun": f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"',
        "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> queue; else echo localhost; fi',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "run.toml").write_text(
        'preset = "demo"\n[model]\nstage = 1\n'
        "[training]\nsteps = 10_000\nbatch_size = 4\nwarmup = 0\nsave_every = 10_000\n"
        f'[data]\npath = "{photos}"\nworkers = 0\n[evaluation]\nlog_every = 1\npictures_every = 0\n'
    )
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "1",
        "NPROC_PER_NODE": "2",
        "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}",
    }

    def submit(*words: str) -> subprocess.Popen:
        command = ["bash", str(SLURM), "run.toml", "out", "--device", "cpu", *words]
        with (tmp_path / "job.log").open("a") as log:
            return subprocess.Popen(command, cwd=tmp_path, env={**environment, **job}, stdout=log, stderr=log)

    return submit


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_goes_on(submit, tmp_path):
    job, log = submit(), tmp_path / "out" / "log.jsonl"
    deadline = time.monotonic() + LIMIT
    while not (log.is_file() and log.stat().st_size):
        assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "job.log").read_text()
        time.sleep(0.2)
    os.kill(int((tmp_path / "agent").read_text()), signal.SIGTERM)
    assert job.wait(LIMIT) != 0
    assert (tmp_path / "queue").read_text().split() == [str(os.getpid())]
    model = tmp_path / "out" / "model" / "config.json"
    step = read_json(model)["provenance"]["step"]
    assert 1 <= step < 10_000

    assert submit("--set", f"steps={step + 2}").wait(LIMIT) == 0, (tmp_path / "job.log").read_text()
    assert read_json(model)["provenance"]["step"] == step + 2
    assert len((tmp_path / "queue").read_text().split()) == 1, "a job that is done is not queued"


@pytest.mark.slow
def test_a_job_that_cannot_start_is_not_queued_again(submit, tmp_path):
    assert submit("--set", "training.lr=-1").wait(LIMIT) != 0
    assert "lr: expected" in (tmp_path / "job.log").read_text()
    assert not (tmp_path / "queue").exists()


# ---- what is written about them ----


def name_of(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_commands_in_its_first_lines_are_its_own(path):
    """And it says what it is, and takes only options that it has."""
    text = path.read_text()
    head = text[: text.index('"""\n', 3)]
    name = name_of(path).removesuffix("/__init__.py")  # what is started, or copied
    commands = [line for line in re.sub(r"\\\\\n\s*", " ", head).splitlines() if f"examples/{name}" in line]
    assert commands
    known = set(re.findall(r'add_argument\("(--[\w-]+)"', text))
    for line in commands:
        own = line.split(name)[1]
        assert {word for word in shlex.split(own) if word.startswith("--")} <= known
    if name in (*LOOPS, "finetune_generator.py"):
        assert {"--data", "--out", "--steps"} <= known


def test_the_page_lists_every_example():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert {name_of(path) for path in FILES} == set(re.findall(r"\]\(\.\./examples/([\w./]+)\)", page))


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_it_uses_public_names_alone(path):
    assert re.findall(r"(?:^from alitok_fast\S* import .*\b_\w+|\balitok_fast\S*\._\w+)", path.read_text(), re.M) == []
    assert re.findall(r"\b(?:tokenizer|generator|model|cache|pipeline|source)\._\w+", path.read_text()) == []
