"""The token cache: nothing is taken at its word, nothing of the user's is written over, a full disk loses nothing."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from noise import META, Source, encode

from alitok_fast.data import cache_writer, validate_token_cache, write_token_cache
from alitok_fast.data.token_cache import TokenCacheMeta
from alitok_fast.storage.files import locked


def write(folder: Path, meta: TokenCacheMeta = META, encoder=encode, **options) -> None:
    write_token_cache(folder, Source(), encoder, meta, **{"batch_size": 1, "workers": 1, **options})


@pytest.fixture
def whole(tmp_path: Path) -> np.ndarray:
    write(tmp_path / "whole")
    return validate_token_cache(tmp_path / "whole").tokens.copy()


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose writer was killed after three of the five images, each a block of its own."""
    monkeypatch.setattr(cache_writer, "_BATCHES_PER_BLOCK", 1)
    calls = []

    def killed(images: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return encode(images)

    with pytest.raises(RuntimeError, match="killed"):
        write(tmp_path / "begun", encoder=killed)
    return tmp_path / "begun"


def counting(calls: list[int]):
    return lambda images: (calls.append(len(images)), encode(images))[1]


def test_a_begun_cache_goes_on_where_it_stopped(begun: Path, whole: np.ndarray) -> None:
    calls: list[int] = []
    write(begun, encoder=counting(calls))
    assert calls == [2, 2]  # images 3 and 4, two crops each
    assert (validate_token_cache(begun).tokens == whole).all()
    assert sorted(os.listdir(begun)) == ["labels.npy", "meta.json", "tokens.npy"]


@pytest.mark.parametrize(("image", "again"), [(0, 5), (1, 4), (2, 3)])
def test_tokens_that_are_not_there_are_encoded_again(begun: Path, whole, image: int, again: int, caplog) -> None:
    """The progress file says three images; what the disk holds of one is zeros."""
    raw = bytearray((begun / "tokens.partial.npy").read_bytes())
    row = 2 * 3 * 2
    at = len(raw) - (5 - image) * row
    raw[at : at + row] = bytes(row)
    (begun / "tokens.partial.npy").write_bytes(raw)
    calls: list[int] = []
    write(begun, encoder=counting(calls))
    assert len(calls) == again and "damaged: written again" in caplog.text
    assert (validate_token_cache(begun).tokens == whole).all()


@pytest.mark.parametrize("damage", ["missing", "short", "link"])
def test_without_the_tokens_the_progress_counts_for_nothing(begun: Path, whole, damage: str, tmp_path: Path) -> None:
    partial, victim = begun / "tokens.partial.npy", tmp_path / "victim"
    victim.write_bytes(partial.read_bytes())
    before = victim.read_bytes()
    partial.unlink()
    if damage == "short":
        partial.write_bytes(before[:-1])
    if damage == "link":
        partial.symlink_to(victim)
    calls: list[int] = []
    write(begun, encoder=counting(calls))
    assert len(calls) == 5 and (validate_token_cache(begun).tokens == whole).all()
    assert victim.read_bytes() == before


def test_a_count_beyond_what_is_there_is_no_work_done(begun: Path, whole: np.ndarray) -> None:
    progress = json.loads((begun / "progress.json").read_text())
    progress["blocks"].append([5, 12345])
    (begun / "progress.json").write_text(json.dumps(progress))
    write(begun)
    assert (validate_token_cache(begun).tokens == whole).all()
    (begun / "meta.json").unlink()
    (begun / "progress.json").write_text(json.dumps({**progress, "blocks": [[9, 1]]}))
    with pytest.raises(ValueError, match="progress.json: blocks: expected ascending image numbers"):
        write(begun)


def test_killed_between_the_tokens_name_and_the_metadata(
    tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    with monkeypatch.context() as patch:
        real = cache_writer.write_json
        patch.setattr(cache_writer, "write_json", lambda p, v: 1 / 0 if p.name == "meta.json" else real(p, v))
        with pytest.raises(ZeroDivisionError):
            write(folder)
    calls: list[int] = []
    write(folder, encoder=counting(calls))
    assert calls == [] and (validate_token_cache(folder).tokens == whole).all()


@pytest.mark.parametrize("name", ["tokenizer", "data", "image_size", "codebook_size", "class_names", "source"])
def test_another_input_is_refused_by_name(begun: Path, name: str) -> None:
    other = {"image_size": 5, "codebook_size": 60, "class_names": ["a", "c"]}.get(name, "other")
    with pytest.raises(ValueError, match=rf"images or settings: {name}.*: expected .*--force"):
        write(begun, dataclasses.replace(META, **{name: other}))
    write(begun, dataclasses.replace(META, **{name: other}), force=True)
    assert getattr(validate_token_cache(begun).meta, name) == other


@pytest.mark.parametrize("name", ["labels.npy", "tokens.npy", "meta.json", "progress.json", "tokens.partial.npy"])
@pytest.mark.parametrize("link", [False, True])
def test_files_of_others_are_kept_unless_forced(tmp_path: Path, name: str, link: bool) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    mine.write_text('{"mine": 1}')
    (out / name).symlink_to(mine) if link else (out / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=f"out: expected a new folder or a token cache, got .*{name}.*--force"):
        write(out)
    assert (out / name).read_text() == '{"mine": 1}' and os.listdir(out) == [name]
    write(out, force=True)
    assert len(validate_token_cache(out)) == 5 and mine.read_text() == '{"mine": 1}'


def test_a_full_disk_is_one_line_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"tokens.partial.npy was not written, it needs [\d,]+ bytes: No space left"):
            write(tmp_path / "x", encoder=counting(calls))
    assert calls == [] and os.listdir(tmp_path / "x") == []
    write(tmp_path / "x")
    with monkeypatch.context() as patch:  # where nothing can be reserved
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="tokens.partial.npy was not written"):
            write(tmp_path / "y")


def test_space_is_taken_before_the_first_image(tmp_path: Path) -> None:
    def check(images: torch.Tensor) -> torch.Tensor:
        status = (tmp_path / "x" / "tokens.partial.npy").stat()
        assert status.st_size >= 5 * 12 and status.st_blocks * 512 >= status.st_size
        return encode(images)

    write(tmp_path / "x", encoder=check)


def test_a_second_writer_is_refused(begun: Path) -> None:
    with locked(begun / cache_writer.LOCK_NAME), pytest.raises(ValueError, match="which another process is writing"):
        write(begun)


def test_leftovers_of_killed_writers_go(begun: Path) -> None:
    (begun / ".labels.npy.alitok-tmp").write_text("half")
    write(begun)
    assert not [name for name in os.listdir(begun) if name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": -5}, "batch_size: expected a whole number of at least 1, got -5"),
        ({"batch_size": 0}, "batch_size: expected a whole number"),
        ({"batch_size": 1.5}, "batch_size: expected a whole number"),
        ({"batch_size": True}, "batch_size: expected a whole number"),
        ({"workers": 0}, "workers: expected a whole number"),
        ({"meta": dataclasses.replace(META, num_crops=3)}, "num_crops: expected one of 1, 2, 10, got 3"),
    ],
)
def test_counts_are_checked_and_nothing_is_left(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_threads_do_not_change_the_tokens(tmp_path: Path, whole: np.ndarray) -> None:
    write(tmp_path / "x", workers=4, batch_size=2)
    assert (validate_token_cache(tmp_path / "x").tokens == whole).all()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "data", [b"", npz(), b"PK\x03\x04junk", b"\x93NUMPY\1\0\xff\xff{", b"\x93NUMPY\1\0\x08\0{'a': (\n"]
)
@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy"])
def test_damaged_arrays_name_the_file(tmp_path: Path, whole, name: str, data: bytes) -> None:
    path = tmp_path / "whole" / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: expected a whole .npy array, got ."):
        validate_token_cache(path.parent)


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path, whole) -> None:
    np.save(tmp_path / "whole" / "labels.npy", np.array([object()] * 5, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="labels.npy: expected int64 of shape"):
        validate_token_cache(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size: expected a whole number of at least 1, got 0"),
        ({"num_tokens": "x"}, "num_tokens: expected a whole number of at least 1, got 'x'"),
        ({"codebook_size": True}, "codebook_size: expected a whole number"),
        ({"num_images": 10**30}, "num_images: expected a whole number"),
        ({"class_names": 5}, "class_names: expected a list of names, got 5"),
        ({"class_names": ["a", None]}, "class_names: expected a list of names"),
        ({"source": 1}, "source: expected text, got 1"),
        ({"format": 9}, "expected format 2, got 9"),
        ({"more": 1}, "expected token cache metadata, got .*more"),
    ],
)
def test_metadata_are_checked_by_name(tmp_path: Path, whole, changes: dict, message: str) -> None:
    path = tmp_path / "whole" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=f"meta.json: {message}"):
        validate_token_cache(path.parent)


def test_caches_of_the_first_version_are_read(tmp_path: Path, whole) -> None:
    path = tmp_path / "whole" / "meta.json"
    meta = json.loads(path.read_text())
    names = {"num_images": "images", "num_crops": "crops", "num_tokens": "tokens", "class_names": "classes"}
    old = {names.get(name, name): value for name, value in meta.items() if name != "data"}
    path.write_text(json.dumps({**old, "format": 1}))
    assert len(validate_token_cache(path.parent)) == 5
    write(path.parent)  # whole, of the same images and settings: nothing to do
    assert json.loads(path.read_text())["format"] == 1


def test_fingerprints_follow_tokens_labels_and_metadata(tmp_path: Path, whole) -> None:
    folder = tmp_path / "whole"
    found = {validate_token_cache(folder).fingerprint()}
    np.save(folder / "labels.npy", np.array([0, 1, 0, 1, 0]))
    found.add(validate_token_cache(folder).fingerprint())
    np.save(folder / "tokens.npy", whole[::-1].copy())
    found.add(validate_token_cache(folder).fingerprint())
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "tokenizer": "other"}))
    found.add(validate_token_cache(folder).fingerprint())
    assert len(found) == 4


def test_text_from_a_file_is_shown_escaped(tmp_path: Path, whole) -> None:
    path = tmp_path / "whole" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "source": "\x1b]0;x\x07" * 100}))
    summary = validate_token_cache(path.parent).summary
    assert summary.isprintable() and len(summary) < 200


def test_force_begins_anew(tmp_path: Path, whole) -> None:
    (tmp_path / "whole" / "tokens.npy").write_bytes(b"damaged")
    write(tmp_path / "whole")  # whole, as far as its metadata say
    write(tmp_path / "whole", force=True)
    assert (validate_token_cache(tmp_path / "whole").tokens == whole).all()


@pytest.mark.parametrize("shape", [(99999999999, 2, 3), (5, 2, 2**70), (-5, -2, 3), (5, 2), (), ("a",), (5.0, 2, 3)])
def test_the_shape_in_a_header_is_not_believed(tmp_path: Path, whole, shape: tuple) -> None:
    path = tmp_path / "whole" / "tokens.npy"
    header = repr({"descr": "<u2", "fortran_order": False, "shape": shape}).ljust(117).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(60))
    with pytest.raises(ValueError, match="tokens.npy: expected "):
        validate_token_cache(path.parent)


def test_the_fingerprint_is_that_of_earlier_versions(tmp_path: Path, whole) -> None:
    """Runs that were begun on a cache go on with it."""
    assert validate_token_cache(tmp_path / "whole").fingerprint() == "f974c7671ed8d63c"  # by alitok_fast 0.2.0
    assert "shard" not in json.loads((tmp_path / "whole" / "meta.json").read_text())
