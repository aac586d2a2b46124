"""Options: written once, checked by name; outputs that are somebody else's; help without torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from alitok_fast.cli.app import app
from alitok_fast.cli.options import DeviceOptions, LoadOptions, beside, check_picture
from alitok_fast.inference.params import SamplingParams


@pytest.mark.parametrize("command", ["sample", "complete", "watch"])
def test_every_setting_is_an_option(command):
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for group in (SamplingParams, LoadOptions):
        for field in dataclasses.fields(group):
            assert f"--{field.name.replace('_', '-')} " in text, field.name
            assert field.metadata["help"].split()[0] in text


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["info", "--help"], ["--version"]])
def test_help_needs_no_torch(arguments):
    program = (
        "import sys; from alitok_fast.cli import main\n"
        f"sys.argv = ['alitok-fast', *{arguments}]\n"
        "try: main()\n"
        "finally: assert not {'torch', 'PIL', 'numpy'} & set(sys.modules), 'slow'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "slow" not in done.stderr, done.stderr


def test_where_a_model_runs_is_checked_when_it_is_loaded():
    with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got 'gpu'"):
        DeviceOptions(device="gpu").load_tokenizer("demo")


def test_a_picture_of_the_user_s_is_not_overwritten(tmp_path):
    mine, ours = tmp_path / "mine.png", tmp_path / "ours.png"
    check_picture(mine, force=False)
    for path in (mine, ours):
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(path)
    beside(ours).write_text(json.dumps({"versions": {"alitok_fast": "0.2.0"}}))
    check_picture(ours, force=False)
    with pytest.raises(ValueError, match="mine.png is there, and no command here has written it"):
        check_picture(mine, force=False)
    check_picture(mine, force=True)
    for force in (False, True):
        with pytest.raises(ValueError, match="out: expected another file than the input"):
            check_picture(ours, force, inputs=[mine, ours])


def test_metadata_of_the_user_s_is_not_overwritten(tmp_path):
    (tmp_path / "a.png.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="a.png.json is there"):
        check_picture(tmp_path / "a.png", force=False)
