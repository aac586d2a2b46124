"""Files that appear whole: modes, links, leftovers, writers at the same time; JSON, differences, locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from alitok_fast.storage import files
from alitok_fast.storage.files import SUFFIX, differences, leftovers, locked, read_json, write_atomically, write_json

HOLD = """
import sys
from pathlib import Path
from alitok_fast.storage import files
from alitok_fast.storage.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a.safetensors", lambda file: save_file({"a": torch.ones(3)}, file))
        write_json(tmp_path / "b.json", {})
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("a.safetensors", "b.json")} == {mode}


def test_links_are_replaced_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "x.json").symlink_to(victim)
    write_json(tmp_path / "x.json", {"a": 1})
    assert victim.read_text() == "precious" and not (tmp_path / "x.json").is_symlink()
    (tmp_path / f".y.json{SUFFIX}").symlink_to(victim)
    with pytest.raises(OSError, match="y.json was not written"):
        write_json(tmp_path / "y.json", {"a": 1})
    assert victim.read_text() == "precious"


def test_leftovers_of_killed_writers_are_overwritten(tmp_path):
    left = tmp_path / f".x.json{SUFFIX}"
    left.write_text("half")
    left.chmod(0o600)
    assert leftovers(tmp_path, {"x.json"}) == [left] and leftovers(tmp_path, {"y.json"}) == []
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json(tmp_path / "x.json") == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def test_writers_of_one_file_take_turns(tmp_path):
    path = tmp_path / "x.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_json(path, {"a": [i] * 1000}), range(64)))
    assert len(set(read_json(path)["a"])) == 1 and os.listdir(tmp_path) == ["x.json"]


def test_a_lock_is_held_by_one_and_dies_with_its_process(tmp_path):
    path = tmp_path / "writing.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is writing"), locked(path):
            pass
        holder.kill()
        holder.wait()
        with locked(path), pytest.raises(ValueError, match="another process is writing"), locked(path):
            pass
    assert not path.exists()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    """Some network file systems have none; whatever is written there must still be written."""

    def flock(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json(tmp_path / "x.json") == {"a": 1} and "has no locks" in caplog.text
    with locked(tmp_path / "writing.lock"):
        pass
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", "\x00", "[" * 100_000, '"a"'])
def test_json_that_is_none_names_its_file(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x.json: expected a manifest, got "):
        read_json(tmp_path / "x.json", "a manifest")


def test_differences():
    assert differences({"a": [1, None]}, {"a": [1]}) == ["a: expected '2 entries', got '1 entries'"]
    before = {"seed": 0, "labels": [1, 2, 3], "train": {"lr": 1.0, "log_every": 3}, "gone": True, "device": "cpu"}
    now = {"seed": 1, "labels": [1, 5], "train": {"lr": 2.0, "log_every": 4}, "device": "cuda"}
    assert differences(before, before) == []
    assert differences(before, now, {"device", "log_every"}) == [
        "seed: expected 0, got 1",
        "labels[1]: expected 2, got 5",
        "train.lr: expected 1.0, got 2.0",
        "gone: expected True, got None",
    ]
