"""What is wrong with pictures, the log from which an inspection goes on, and the list that training skips by."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alitok_fast.data import find_source, inspection, inspection_log, open_source, skip_samples
from alitok_fast.data.faults import picture_faults
from alitok_fast.data.inspection import inspect_source
from alitok_fast.data.inspection_files import check_data
from alitok_fast.data.inspection_log import InspectionLog
from alitok_fast.data.pictures import take_turns
from alitok_fast.data.skip_list import HEADING, read_skip_list, write_skip_list

RNG = np.random.default_rng(0)
COLOUR = Image.fromarray(RNG.integers(0, 256, (40, 50, 3), np.uint8))
GREY16 = Image.fromarray(RNG.integers(0, 65536, (40, 50)).astype(np.uint16))
CLEAR = COLOUR.copy()
CLEAR.putalpha(Image.fromarray(RNG.integers(0, 256, (40, 50), np.uint8)))
HOLE = Image.new("RGBA", (9, 9), "red")
HOLE.paste((0, 0, 0, 0), (0, 0, 4, 4))
FILM = {"save_all": True, "append_images": [COLOUR.rotate(90)]}


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def deep_png() -> bytes:
    """16 bits a channel in colour, which Pillow reads as 8 without a word."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + RNG.integers(0, 65536, 150).astype(">u2").tobytes() for _ in range(40))
    header = struct.pack(">IIBBBBB", 50, 40, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


WHOLE = encoded(COLOUR, "JPEG")
CASES = {
    "whole.jpg": (WHOLE, []),
    "opaque.png": (encoded(COLOUR.convert("RGBA"), "PNG"), []),
    "one.gif": (encoded(COLOUR, "GIF"), []),
    "half.jpg": (WHOLE[: len(WHOLE) // 2], ["truncated"]),
    "half.png": (encoded(COLOUR, "PNG")[:900], ["truncated"]),
    "empty.jpg": (b"", ["truncated"]),
    "text.jpg": (b"not a picture", ["unreadable"]),
    "float.tif": (encoded(Image.fromarray(np.float32(RNG.random((40, 50)))), "TIFF"), ["unreadable"]),
    "film.gif": (encoded(COLOUR, "GIF", **FILM), ["animated"]),
    "film.png": (encoded(COLOUR, "PNG", **FILM), ["animated"]),
    "film.webp": (encoded(COLOUR, "WEBP", **FILM), ["animated"]),
    "pages.tif": (encoded(COLOUR, "TIFF", **FILM), ["animated"]),
    "print.jpg": (encoded(COLOUR.convert("CMYK"), "JPEG"), ["CMYK"]),
    "deep.png": (encoded(GREY16, "PNG"), ["16-bit"]),
    "deep.tif": (encoded(GREY16, "TIFF"), ["16-bit"]),
    "deeper.png": (deep_png(), ["16-bit"]),
    "clear.png": (encoded(CLEAR, "PNG"), ["transparent"]),
    "small.png": (encoded(COLOUR.resize((50, 31)), "PNG"), ["tiny"]),
    "much.gif": (encoded(HOLE, "GIF", **FILM), ["tiny", "transparent", "animated"]),
}


@pytest.mark.parametrize("name", CASES)
def test_faults_of_a_picture(tmp_path: Path, name: str) -> None:
    data, kinds = CASES[name]
    (tmp_path / name).write_bytes(data)
    for picture in (data, tmp_path / name):
        assert [fault.kind for fault in picture_faults(picture, name, 32)] == kinds


def test_large_pictures_wait_for_their_turn() -> None:
    class Turn(contextlib.AbstractContextManager):
        held = 0

        def __exit__(self, *exception: object) -> None:
            self.held += 1

    turn = Turn()
    take_turns(turn)
    try:
        for side in (3900, 4100):
            picture_faults(encoded(Image.new("L", (side, side)), "PNG", compress_level=1), "x.png", 32)
    finally:
        take_turns(contextlib.nullcontext())
    assert turn.held == 1


@pytest.fixture
def photos(tmp_path: Path, jpegs) -> Path:
    """Two classes: cat has a copy in dog, dog has one twice and one that is cut short."""
    for name, data in (
        ("cat/a.jpg", jpegs[0]), ("cat/b.jpg", jpegs[1]), ("dog/c.jpg", jpegs[0]), ("dog/d.jpg", jpegs[2]),
        ("dog/e.jpg", jpegs[2]), ("dog/f.jpg", jpegs[3][:300]), ("dog/g.jpg", jpegs[3]),
    ):  # fmt: skip
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data)
    return tmp_path / "photos"


FOUND = [
    ("mislabelled", "cat/a.jpg", "the same bytes are in 'cat' and 'dog'"),
    ("mislabelled", "dog/c.jpg", "the same bytes are in 'cat' and 'dog'"),
    ("duplicate", "dog/e.jpg", "the same bytes as dog/d.jpg"),
]


def test_a_whole_data_set(photos: Path) -> None:
    found = inspect_source(open_source(photos), progress=False)
    assert [finding for finding in found.findings if finding.kind != "truncated"] == FOUND
    assert found.counts == {"truncated": 1, "duplicate": 1, "mislabelled": 2}
    assert not found.readable and (found.pictures, found.classes) == (7, 2)
    json.dumps(found.to_dict())


def test_training_skips_by_the_list(photos: Path, tmp_path: Path) -> None:
    found, count = check_data(open_source(photos), tmp_path / "bad.txt", workers=0, progress=False)
    assert count == 3 and sorted(read_skip_list(tmp_path / "bad.txt")) == ["cat/a.jpg", "dog/c.jpg", "dog/f.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "photos"]
    source = open_source(photos, skip_list=tmp_path / "bad.txt")
    assert [path.name for path in source.paths] == ["b.jpg", "d.jpg", "e.jpg", "g.jpg"] and source.labels.tolist() == [
        0,
        1,
        1,
        1,
    ]
    assert "3 samples of the skip list" in source.summary
    assert source.fingerprint() != open_source(photos).fingerprint()
    _, count = check_data(open_source(photos), tmp_path / "bad.txt", ["duplicate"], 0, progress=False)
    assert count == 1 and read_skip_list(tmp_path / "bad.txt") == ["dog/e.jpg"]
    with pytest.raises(ValueError, match="skip: expected one of 'unreadable', .* got 'ugly'"):
        check_data(open_source(photos), tmp_path / "bad.txt", ["ugly"], 0)


def test_nothing_of_somebody_elses_is_written_over(photos: Path, tmp_path: Path) -> None:
    source = open_source(photos)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out: .*notes.txt is there, and is no skip list; choose another or --force"):
        check_data(source, tmp_path / "notes.txt", workers=0, progress=False)
    (tmp_path / "bad.txt.progress").write_text("mine")
    with pytest.raises(ValueError, match="out: .*bad.txt.progress is there, and no check has written it"):
        check_data(source, tmp_path / "bad.txt", workers=0, progress=False)
    with pytest.raises(ValueError, match="out: expected a file in a folder that exists"):
        check_data(source, tmp_path / "no" / "bad.txt", workers=0, progress=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    check_data(source, tmp_path / "notes.txt", workers=0, progress=False, force=True)


class _Stopped(Exception):
    pass


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch):
    """counted(n): the n-th picture that is read raises; gives the list of those that were read."""

    look = inspection._Inspect.__call__

    def install(last: int | None = None) -> list[int]:
        read: list[int] = []

        def watched(self, index: int):
            if last is not None and len(read) == last:
                raise _Stopped
            read.append(index)
            return look(self, index)

        monkeypatch.setattr(inspection._Inspect, "__call__", watched)
        return read

    monkeypatch.setattr(inspection, "BATCH", 2)
    return install


def test_an_interrupted_inspection_goes_on(photos: Path, tmp_path: Path, counted) -> None:
    out, log = tmp_path / "bad.txt", tmp_path / "bad.txt.progress"
    counted(5)
    with pytest.raises(_Stopped):
        check_data(open_source(photos), out, workers=0, progress=False)
    assert log.exists() and not out.exists()
    with log.open("ab") as file:
        file.write(b'[["torn')
    read = counted()
    found, _ = check_data(open_source(photos), out, workers=0, progress=False)
    assert 0 < len(read) < 7 and read[-1] == 6 and not log.exists()
    assert [finding for finding in found.findings if finding.kind != "truncated"] == FOUND


def test_ctrl_c_while_the_log_is_written_counts_nothing_twice(
    photos: Path, tmp_path: Path, counted, monkeypatch
) -> None:
    read, log, line = counted(), tmp_path / "log", InspectionLog._line
    monkeypatch.setattr(inspection_log, "_BLOCK", 4)

    def interrupted(self, value) -> None:
        line(self, value)
        if "seen" in value:
            raise KeyboardInterrupt

    monkeypatch.setattr(InspectionLog, "_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inspect_source(open_source(photos), log, progress=False)
    monkeypatch.setattr(InspectionLog, "_line", line)
    read.clear()
    found = inspect_source(open_source(photos), log, progress=False)
    assert read == [4, 5, 6] and [finding for finding in found.findings if finding.kind != "truncated"] == FOUND


@pytest.mark.parametrize("change", ["data", "tiny", "damage", "longer", "twice", "kind"])
def test_a_log_of_something_else_is_not_believed(photos: Path, tmp_path: Path, counted, change: str, caplog) -> None:
    log = tmp_path / "log"
    counted(5)
    with pytest.raises(_Stopped):
        inspect_source(open_source(photos), log, progress=False)
    lines = log.read_text().splitlines()
    if change == "data":
        (photos / "dog" / "h.jpg").write_bytes(b"none")
    elif change == "longer":
        seen = json.loads(lines[1])["seen"]
        log.write_text("\n".join([lines[0], json.dumps({"first": 0, "seen": seen * 9})]) + "\n")
    elif change == "twice":
        log.write_text("\n".join([lines[0], lines[1], lines[1]]) + "\n")
    elif change == "kind":
        log.write_text("\n".join([lines[0], json.dumps({"first": 0, "seen": [["", [["ugly", ""]]]]})]) + "\n")
    elif change == "damage":
        log.write_text("\n".join([lines[0], '{"first": 0, "seen": [[1]]}']) + "\n")
    read = counted()
    source = open_source(photos)
    found = inspect_source(source, log, tiny=5 if change == "tiny" else 32, progress=False)
    assert len(read) == len(source) and "everything is read again" in caplog.text
    assert found.counts["mislabelled"] == 2


def test_idx_and_sources_of_ones_own() -> None:
    class Own:
        name, class_names, labels = "own", ["a", "b"], np.array([0, 1, 1, 2])

        def __len__(self) -> int:
            return 4

        def image(self, index: int) -> np.ndarray:
            return np.full((9, 8, 3), min(index, 2), np.uint8)

    assert [tuple(finding) for finding in inspect_source(Own(), progress=False).findings] == [
        ("mislabelled", "image 2", "the same bytes are in 'b'"),
        ("mislabelled", "image 3", "the same bytes are in 'b'"),
        ("mislabelled", "image 3", "label 2 of 2 classes"),
    ]


def test_wrong_labels_and_lost_samples_are_named_and_can_be_skipped(tmp_path: Path, jpegs) -> None:
    (tmp_path / "x.jpg").write_bytes(jpegs[0])
    (tmp_path / "y.jpg").write_bytes(jpegs[1])
    (tmp_path / "names.txt").write_text("cat\n")
    (tmp_path / "list.txt").write_text("x.jpg 0\ny.jpg 7\ngone.jpg 0\n")
    options = {"class_names": tmp_path / "names.txt"}
    found, count = check_data(
        find_source(tmp_path / "list.txt", **options), tmp_path / "bad.txt", workers=0, progress=False
    )
    assert [finding[:2] for finding in found.findings] == [("mislabelled", "y.jpg"), ("unreadable", "gone.jpg")]
    assert count == 2 and not found.readable
    source = open_source(tmp_path / "list.txt", skip_list=tmp_path / "bad.txt", **options)
    assert len(source) == 1 and "left out: 2 samples of the skip list" in source.summary


def test_skip_lists_hold_any_name(tmp_path: Path) -> None:
    names = ["a\nb", "a\\nb", "\\", "\\\\n", "a\tb", "é\udcff", " x ", "#"]
    write_skip_list(tmp_path / "bad.txt", "x\ny", [("tiny", name) for name in names])
    assert read_skip_list(tmp_path / "bad.txt") == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "skip_list: expected a list by `alitok-fast data check`"),
        ("a.jpg\n", "skip_list: expected a list by `alitok-fast data check`"),
        ("HEAD\na.jpg\n", "bad.txt: expected a kind, a tab and a name in line 2, got 'a.jpg'"),
        (
            "HEAD\ntiny\tother.jpg\n",
            "skip_list: expected names of these data, such as 'cat/a.jpg', got others in .*'other.jpg'",
        ),
    ],
)
def test_files_that_are_no_skip_list(photos: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.txt").write_text(text.replace("HEAD", HEADING))
    with pytest.raises(ValueError, match=message):
        open_source(photos, skip_list=tmp_path / "bad.txt")


def test_a_skip_list_of_idx_files(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 3, 2, 2) + bytes(range(12)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 3) + bytes([0, 1, 2]))
    source = open_source(tmp_path, image_size=2)
    write_skip_list(tmp_path / "bad.txt", "x", [("tiny", "image 1")])
    skip_samples(source, tmp_path / "bad.txt")
    assert source.labels.tolist() == [0, 2] and source.image(1)[0, 0, 0] == 8 and source.sample_name(1) == "image 2"
