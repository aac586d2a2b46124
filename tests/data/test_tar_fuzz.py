"""Damaged and hostile tar files: an index that lies within its shard, or damage said in one line."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alitok_fast.data import UnreadableImageError, find_source
from alitok_fast.data.tar_index import LabelColumn, index_shard

pytest.importorskip("webdataset")
COMMON = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
NAMES = ("a.jpg", "a.cls", "b.json", "b.txt", "../up.jpg", "/abs.jpg", "._x.jpg", "d/" * 60 + "long.jpg", "é.jpg",
         "\x1b[2J.jpg", "x" * 300 + ".jpg", ".jpg", "noext", "c.seg.png", "C.JPG", "a..jpg",
         "a/../../b.jpg")  # fmt: skip
TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE,
         tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"L", b"K", b"x", b"g", b"X", b"Z")  # fmt: skip
CONTENTS = (b"", b"3", b"-1", b"cat", b'{"label": 2}', b'{"label": null}', b"[" * 2000, b"9" * 60,
            b"\xff\xd8\xff" + bytes(40),
            b"30 size=-1\n", b"22 GNU.sparse.major=1\n", b"99999999999 path=x\n", b"\0" * 512)  # fmt: skip
SIZES = (0, 1, -1, 512, 1 << 33, (1 << 63) - 1, 1 << 80)


@st.composite
def archives(draw) -> bytes:
    """A tar file of odd members, then with bytes changed, cut off, doubled or in front."""
    file = io.BytesIO()
    kind = draw(st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for _ in range(draw(st.integers(0, 6))):
            info = tarfile.TarInfo(draw(st.sampled_from(NAMES)))
            data = draw(st.sampled_from(CONTENTS))
            info.size, info.type = len(data), draw(st.sampled_from(TYPES[:8]))
            info.linkname = draw(st.sampled_from(("", "a.jpg", "/etc/passwd")))
            try:
                archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
            except ValueError:  # this format has no such names
                continue
    raw = bytearray(file.getvalue())
    for _ in range(draw(st.integers(0, 4))):
        change = draw(st.sampled_from(("byte", "type", "size", "cut", "double", "nonsense")))
        at = draw(st.integers(0, max(0, len(raw) // 512 - 1))) * 512
        if change == "byte" and raw:
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
            continue
        if change == "cut":
            del raw[draw(st.integers(0, len(raw))) :]
        elif change == "double":
            raw[at:at] = raw[at : at + draw(st.integers(1, 2048))]
        elif change == "nonsense":
            raw[at : at + 512] = b"\xa5" * 512
        elif len(raw) >= at + 512:
            if change == "type":
                raw[at + 156 : at + 157] = draw(st.sampled_from(TYPES))
            else:
                size = draw(st.sampled_from(SIZES))
                octal = b"%011o\0" % size if 0 <= size < 1 << 33 else b"\x80" + (size % (1 << 88)).to_bytes(11, "big")
                raw[at + 124 : at + 136] = octal[:12] if size >= 0 else b"\xff" * 12
            raw[at + 148 : at + 156] = b" " * 8
            raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    return bytes(raw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tars")


def check(folder: Path, data: bytes) -> None:
    path = folder / "x.tar"
    path.write_bytes(data)
    index = index_shard(path, LabelColumn())
    assert len(index.names) == len(index.sizes) == len(index.numbers) == len(index.text_ids)
    assert (index.offsets >= 0).all() and (index.sizes >= 0).all() and (index.offsets + index.sizes <= len(data)).all()
    assert (index.text_ids < len(index.texts)).all() and (index.numbers >= -3).all()
    assert not any(".." in name.split("/") or name.startswith("/") for name in index.names)
    assert index.damage == "" or len(index.damage.splitlines()) == 1
    assert [entry.name for entry in folder.iterdir() if entry.name != ".alitok-index"] == ["x.tar"]
    try:
        source = find_source(path)
    except ValueError as error:
        assert "labels of one kind" in str(error)
        return
    assert source.summary.isprintable() and np.asarray(source.labels).max(initial=0) < len(source.class_names)
    for number in range(len(source)):
        with pytest.raises(UnreadableImageError):  # no picture here is one
            source.image(number)


@settings(max_examples=250, **COMMON)
@given(archives())
def test_hostile_archives(folder: Path, data: bytes) -> None:
    check(folder, data)


@pytest.mark.slow
@settings(max_examples=10_000, **COMMON)
@given(archives())
def test_many_hostile_archives(folder: Path, data: bytes) -> None:
    check(folder, data)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """A shard of samples that are no pictures, its index, and what is in that."""
    path = tmp_path_factory.mktemp("stored") / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("a.jpg", b"one"), ("a.txt", b"cat"), ("b.jpg", b"two"), ("b.txt", b"dog"), ("c.md", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    find_source(path)
    (index,) = (path.parent / ".alitok-index").iterdir()
    return path, index, index.read_bytes()


@settings(max_examples=60, **COMMON)
@given(st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=6), st.booleans()), min_size=1, max_size=4))
def test_damaged_indices_are_made_again(stored, changes: list[tuple[int, bytes, bool]]) -> None:
    path, index, raw = stored
    for at, data, insert in changes:
        raw = raw[:at] + data + raw[at + (0 if insert else len(data)) :]
    index.write_bytes(raw)
    source = find_source(path)
    assert [source.encoded(number) for number in range(2)] == [b"one", b"two"]
    assert source.class_names == ["cat", "dog"] and "1 file of another kind" in source.summary
