"""alitok-fast info --probe: its table, and one line for every mistake."""

from __future__ import annotations

import sys

import pytest

from alitok_fast.cli import main
from alitok_fast.inference import probe as probing
from alitok_fast.inference.probe import PROBED_WINDOWS, WindowMeasure
from alitok_fast.models import load_generator, save_model


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments of info) -> (exit status, standard output, standard error)."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alitok-fast", "info", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


@pytest.mark.parametrize(
    "options", [[], ["--weight-dtype", "int8"], ["--weight-dtype", "int8", "--activation-dtype", "int8"]], ids=str
)
def test_table(run, options):
    status, out, err = run("--probe", "demo", "--seconds", 0.5, *options)
    assert (status, err) == (0, "")
    head, *rows, meaning = out.splitlines()
    assert head.split() == ["window", "tokens/pass", "s/image", "speed"]
    assert [int(row.split()[0]) for row in rows] == list(PROBED_WINDOWS)
    assert rows[0].split()[1] == "1.00" and rows[0].split()[3] == "1.00x"
    fastest = max(rows, key=lambda row: float(row.split()[3].rstrip("x"))).split()
    best = {row.split()[0] for row in rows if row.split()[3] == fastest[3]}
    assert meaning.removesuffix(".").split()[-1] in best and "batches of 1, the same images" in meaning


def test_what_is_asked_for_is_what_is_measured(run, tiny_folder, monkeypatch):
    asked = []

    def measure(gen, **options):
        asked.append((gen.config, str(gen.weight_dtype), str(gen.activation_dtype), options))
        return [WindowMeasure(1, 1.0, 0.5, 1.0, 3)]

    monkeypatch.setattr(probing, "probe", measure)
    options = ("--weight-dtype", "int8", "--activation-dtype", "int8", "--batch-size", 5, "--seconds", 7)
    status, out, _ = run("--probe", tiny_folder / "generator", *options)
    assert status == 0 and "Medians of 3 batches of 5" in out and "0.1000" in out, "seconds of an image"
    config = load_generator(tiny_folder / "generator").config
    assert asked == [(config, "torch.int8", "torch.int8", {"batch_size": 5, "seconds": 7.0})]
    run("--probe", tiny_folder / "generator")
    assert asked[1] == (config, "torch.float32", "torch.float32", {"batch_size": 1, "seconds": 60.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--weight-dtype", "int3"),
            "weight_dtype: expected one of float32, bfloat16, int8, float8_e4m3fn, got 'int3'",
        ),
        (("--activation-dtype", "int3"), "activation_dtype: expected one of int8, got 'int3'"),
        (("--weight-dtype", "float8_e4m3fn"), "weight_dtype: expected float32, bfloat16 or int8 on the CPU"),
        (("--activation-dtype", "int8"), "activation_dtype: expected float32 with weights in float32, got int8"),
        (
            ("--weight-dtype", "bfloat16", "--activation-dtype", "int8"),
            "activation_dtype: expected bfloat16 with weights in bfloat16, got int8",
        ),
        (("--batch-size", "0"), "Invalid value for '--batch-size'"),
        (("--batch-size", "two"), "Invalid value for '--batch-size'"),
        (("--seconds", "0"), "Invalid value for '--seconds'"),
        (("--seconds", "nan"), "seconds"),
        (("--probe", "nowhere"), "got 'nowhere', which does not exist"),
        (("--probe", "b"), "got the preset 'b', whose weights are not shipped"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    status, out, err = run(*(() if "--probe" in arguments else ("--probe", "demo")), *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("alitok-fast: ") and err.count("\n") == 1 and message in err


def test_a_tokenizer_cannot_be_probed(run, tiny_folder):
    status, _, err = run("--probe", tiny_folder / "tokenizer")
    assert status == 2 and err.count("\n") == 1 and "generator" in err


def test_windows_that_disagree_are_one_line(run, monkeypatch):
    def measure(*_, **__):
        raise RuntimeError("probe: expected window 2 to give the tokens of window 1")

    monkeypatch.setattr(probing, "probe", measure)
    assert run("--probe", "demo") == (1, "", "alitok-fast: probe: expected window 2 to give the tokens of window 1\n")


def test_weights_that_are_not_finite_are_one_line(run, tiny_folder, tiny_generator):
    gen = tiny_generator()
    gen.output.weight.data[0, 0] = float("nan")
    save_model(tiny_folder / "generator", gen)
    status, _, err = run("--probe", tiny_folder / "generator")
    assert status == 1 and "expected finite logits, got NaN or infinity" in err and err.count("\n") == 1
