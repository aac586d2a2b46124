"""Webdataset shards: the samples that are in them, by index, and what is said of the rest."""

from __future__ import annotations

import io
import logging
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alitok_fast.data import UnreadableImageError, index_files, open_source, read_image, shards, source_fingerprint
from alitok_fast.data.tar_index import LabelColumn, index_shard

pytest.importorskip("webdataset")


def samples(jpegs: list[bytes], labels: list, member: str = "cls", prefix: str = "") -> list[dict]:
    return [{"__key__": f"{prefix}{i:04d}", "jpg": jpegs[i % 4], member: label} for i, label in enumerate(labels)]


def add(path: Path, *members: tuple[str, bytes]) -> Path:
    """Write a tar file of these members as they are."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_pictures_and_labels_by_index(tmp_path: Path, jpegs, write_shard) -> None:
    write_shard("x-000000.tar", *samples(jpegs, [2, 0, 1]))
    write_shard("x-000001.tar", *samples(jpegs, [1, 1], prefix="more/"))
    source = open_source(tmp_path)
    assert source.labels.tolist() == [2, 0, 1, 1, 1] and source.class_names == ["0", "1", "2"]
    assert source.sample_name(4) == "x-000001.tar/more/0001.jpg" and source.summary.endswith("5 pictures in 3 classes")
    for index, picture in enumerate([0, 1, 2, 0, 1]):
        (tmp_path / "one.jpg").write_bytes(jpegs[picture])
        assert (source.image(index) == read_image(tmp_path / "one.jpg")).all()


def test_one_decoder_for_files_and_shards(tmp_path: Path) -> None:
    """Orientation, 16 bits, transparency and formats by content mean the same in a shard as in a folder."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    colour = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    pictures = {
        "turned.jpg": (colour, "JPEG", {"exif": exif}),
        "deep.png": (Image.fromarray(rng.integers(0, 65536, (9, 8)).astype(np.uint16)), "PNG", {}),
        "clear.png": (colour.convert("RGBA").rotate(45), "PNG", {}),
        "other.webp": (colour, "WEBP", {"lossless": True}),
        "named.jpeg": (colour, "PNG", {}),
    }
    (tmp_path / "all").mkdir()
    for name, (picture, kind, options) in pictures.items():
        picture.save(tmp_path / "all" / name, kind, **options)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n%%EOF\n"
    (tmp_path / "all" / "runs.png").write_bytes(page)
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    add(tmp_path / "x.tar", *((name, (tmp_path / "all" / name).read_bytes()) for name in names))
    folder, shard = open_source(tmp_path / "all"), open_source(tmp_path / "x.tar")
    assert len(folder) == len(shard) == 6
    for index, name in enumerate(names):
        if name == "runs.png":
            with pytest.raises(UnreadableImageError, match="x.tar: runs.png: expected a readable image in one of AVIF"):
                shard.image(index)
        else:
            assert (folder.image(index) == shard.image(index)).all()


@pytest.mark.parametrize(
    ("sample", "column", "names", "label"),
    [
        ({"cls": "3"}, None, ["0", "1", "2", "3"], 3),
        ({"json": {"label": 1}}, None, ["0", "1"], 1),
        ({"txt": "tabby cat\n"}, None, ["tabby cat"], 0),
        ({"cls": 2, "json": {"label": 1}}, None, ["0", "1", "2"], 2),
        ({"cls": 2, "json": {"label": 1}}, "json", ["0", "1"], 1),
        ({"cls": 2, "json": {"label": 1, "fine": "siamese"}}, "json.fine", ["siamese"], 0),
        ({"json": {"width": 5}, "txt": "dog"}, None, ["dog"], 0),
        ({"cls": 2, "txt": "dog"}, "none", ["x.tar"], 0),
    ],
)
def test_where_a_label_comes_from(tmp_path: Path, jpegs, write_shard, sample, column, names, label) -> None:
    write_shard("x.tar", {"__key__": "a", "jpg": jpegs[0], **sample})
    source = open_source(tmp_path / "x.tar", label_column=column)
    assert source.class_names == names and source.labels.tolist() == [label]


@pytest.mark.parametrize("place", ["set-{}-0.tar", "{}/0.tar"])
def test_a_class_has_one_label_in_all_splits(tmp_path: Path, jpegs, write_shard, place: str) -> None:
    write_shard(place.format("train"), *samples(jpegs, ["cat", "dog", "owl"], "txt"))
    write_shard(place.format("val"), *samples(jpegs, ["owl", "ant"], "txt"))
    train, val = open_source(tmp_path), open_source(tmp_path, "val")
    assert train.class_names == val.class_names == ["ant", "cat", "dog", "owl"]
    assert train.labels.tolist() == [1, 2, 3] and val.labels.tolist() == [3, 0]
    assert train.name == f"{tmp_path.name}/train"
    with pytest.raises(ValueError, match="split: expected one of 'train', 'val', the splits in .*, got 'test'"):
        open_source(tmp_path, "test")


def test_names_of_numbers_come_from_a_file(tmp_path: Path, jpegs, write_shard) -> None:
    write_shard("x.tar", *samples(jpegs, [1, 0]))
    (tmp_path / "names.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    source = open_source(tmp_path / "x.tar", class_names=tmp_path / "names.txt")
    assert source.class_names == ["tench, Tinca tinca", "goldfish"] and source.labels.tolist() == [1, 0]
    (tmp_path / "names.txt").write_text("tench\n")
    with pytest.raises(
        ValueError, match=r"expected whole data .* got 1 sample whose label is out of range \(such as '0000"
    ):
        open_source(tmp_path / "x.tar", class_names=tmp_path / "names.txt")


def test_braces_name_shards(tmp_path: Path, jpegs, write_shard) -> None:
    for number in range(3):
        write_shard(f"x-{number:03d}.tar", *samples(jpegs, [number]))
    assert open_source(f"{tmp_path}/x-{{000..001}}.tar").labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="data: expected 4 shards in .* got no file .*x-003.tar"):
        open_source(f"{tmp_path}/x-{{000..003}}.tar")
    with pytest.raises(ValueError, match="split: expected 'train', since .* names its shards, got 'val'"):
        open_source(f"{tmp_path}/x-{{000..001}}.tar", "val")


def test_packed_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match="expected tar files, which can be read in any order, got .*x.tar.gz; unpack"):
        open_source(tmp_path / "x.tar.gz")


# ---- what is left out ----


def test_what_is_no_sample_is_counted(tmp_path: Path, jpegs) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:

        def put(name: str, data: bytes = b"", **changes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))

        put("n01", type=tarfile.DIRTYPE)
        put("n01/a.jpg", jpegs[0])
        put("n01/a.jpg", jpegs[1])
        put("n01/._a.jpg", b"\0\5\x16\7")
        put("__MACOSX/a.jpg", jpegs[0])
        put("../../evil.jpg", jpegs[0])
        put("/etc/evil.jpg", jpegs[0])
        put("n01/link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        put("n01/hard.jpg", type=tarfile.LNKTYPE, linkname="n01/a.jpg")
        put("n01/pipe.jpg", type=tarfile.FIFOTYPE)
        put("n01/b.cls", b"1")
        put("n01/b.json", b"{}")
        put("notes.md", b"x")
        put("./n01/z.PNG", jpegs[2])
    source = open_source(tmp_path / "x.tar")
    assert [source.sample_name(i) for i in range(len(source))] == ["x.tar/n01/a.jpg", "x.tar/./n01/z.PNG"]
    for part in (
        "1 member that its sample has already",
        "2 hidden or system names",
        "2 names that lead out of their shards (such as 'evil.jpg')",
        "3 links, sparse files or devices in shards",
        "1 sample without a picture",
        "1 file of another kind (such as 'notes.md')",
    ):
        assert part in source.summary


def test_sparse_members_are_left_out(tmp_path: Path, jpegs) -> None:
    path = add(tmp_path / "x.tar", ("a.jpg", jpegs[0]), ("b.jpg", jpegs[1]))
    raw = bytearray(path.read_bytes())
    at = raw.index(b"b.jpg")
    raw[at + 156 : at + 157] = tarfile.GNUTYPE_SPARSE
    raw[at + 257 : at + 265] = b"ustar  \0"
    raw[at + 386 : at + 512] = bytes(126)
    raw[at + 386 : at + 410] = b"00000000000\0" + b"%011o\0" % len(jpegs[1])
    raw[at + 483 : at + 495] = b"%011o\0" % (1 << 30)
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    path.write_bytes(raw)
    index = index_shard(path, LabelColumn())
    assert list(index.names) == ["a.jpg"] and index.damage == "" and "sparse" in str(index.left_out)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "1 sample without a label"),
        ({"cls": b"cat"}, "1 sample whose label is no number and no name"),
        ({"cls": b"-1"}, "1 sample whose label is out of range"),
        ({"cls": b"99999999999999999"}, "1 sample whose label is out of range"),
        ({"cls": b"1" * 100}, "1 sample whose label is no number"),
        ({"json": b"[" * 3000}, "1 sample whose label is no number"),
        ({"json": b'{"label": [1]}'}, "1 sample whose label is no number"),
        ({"txt": b"a photograph of a cat " * 20}, "1 sample whose label is no number"),
    ],
)
def test_wrong_labels_stop_or_are_skipped(tmp_path: Path, jpegs, content: dict, reason: str) -> None:
    wrong = [("b.jpg", jpegs[1]), *((f"b.{member}", data) for member, data in content.items())]
    add(tmp_path / "x.tar", ("a.jpg", jpegs[0]), ("a.cls", b"1"), *wrong)
    with pytest.raises(ValueError, match=f"expected whole data in .*x.tar, got {reason}"):
        open_source(tmp_path / "x.tar")
    source = open_source(tmp_path / "x.tar", on_error="skip")
    assert source.labels.tolist() == [1] and reason in source.summary


def test_numbers_and_names_are_not_mixed(tmp_path: Path, jpegs) -> None:
    add(tmp_path / "x.tar", ("a.jpg", jpegs[0]), ("a.cls", b"1"), ("b.jpg", jpegs[1]), ("b.txt", b"cat"))
    with pytest.raises(ValueError, match="expected labels of one kind, got numbers as well as names .such as 'cat'"):
        open_source(tmp_path / "x.tar")


def test_captions_are_no_classes(tmp_path: Path, jpegs, monkeypatch) -> None:
    monkeypatch.setattr(shards, "_MOST_CAPTIONS", 2)
    members = [
        (f"{i}.{kind}", data) for i in range(4) for kind, data in (("jpg", jpegs[i]), ("txt", b"Cat no. %d" % i))
    ]
    add(tmp_path / "x.tar", *members)
    with pytest.raises(ValueError, match="label_column: expected class names, got 4 different texts on 4 samples"):
        open_source(tmp_path / "x.tar")
    assert open_source(tmp_path / "x.tar", label_column="none").class_names == ["x.tar"]


def test_archives_beside_folders_of_pictures_are_no_shards(tmp_path: Path, jpegs, write_shard) -> None:
    write_shard("ILSVRC2012_img_val.tar", *samples(jpegs, [0]))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(jpegs[0])
    assert "1 picture in 1 class; left out: 1 file of another kind" in open_source(tmp_path).summary


def test_a_folder_of_shards_may_hold_other_things_but_pictures(tmp_path: Path, jpegs, write_shard) -> None:
    write_shard("x.tar", *samples(jpegs, [0]))
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "sizes.json").write_text("{}")
    assert open_source(tmp_path).sample_name(0) == "x.tar/0000.jpg"
    (tmp_path / "overview.png").write_bytes(jpegs[0])
    with pytest.raises(
        ValueError, match="data: expected pictures or shards in .*, got both .such as 'overview.png'.; name"
    ):
        open_source(tmp_path)


# ---- damaged shards ----


@pytest.mark.parametrize("kind", ["cut", "boundary", "header", "joined", "empty", "huge"])
def test_damaged_shards_stop_or_are_read_as_far_as_they_go(tmp_path: Path, jpegs, kind: str) -> None:
    members = [("a.jpg", jpegs[0]), ("a.cls", b"1"), ("b.jpg", jpegs[1]), ("b.cls", b"0"), ("c.jpg", jpegs[2])]
    path = add(tmp_path / "x.tar", *members)
    whole = path.read_bytes()
    at = whole.index(b"c.jpg")
    damaged = bytearray(whole)
    if kind == "cut":
        damaged = damaged[: at + 700]
    elif kind == "boundary":
        damaged = damaged[:at]
    elif kind == "header":
        damaged[at : at + 512] = b"x" * 512
    elif kind == "joined":
        damaged += whole
    elif kind == "empty":
        damaged = bytearray()
    else:
        damaged[at + 124 : at + 136] = b"\x80" + (1 << 62).to_bytes(11, "big")
        damaged[at + 148 : at + 156] = b" " * 8
        damaged[at + 148 : at + 156] = b"%06o\0 " % sum(damaged[at : at + 512])
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"1 damaged shard \(such as 'x.tar': |at least one"):
        open_source(path)
    if kind != "empty":
        source = open_source(path, on_error="skip")
        assert source.labels.tolist()[:1] == [1] and "1 damaged shard (such as 'x.tar': " in source.summary
    add(path, *members[:4])
    assert len(open_source(path)) == 2  # written anew, indexed anew


def test_a_shard_that_changes_later_is_named(tmp_path: Path, jpegs, write_shard) -> None:
    path = write_shard("x.tar", *samples(jpegs, [0, 0]))
    source = open_source(path)
    os.truncate(path, 600)
    with pytest.raises(
        UnreadableImageError, match="x.tar: 0001.jpg: expected .* bytes, got 0: the shard was cut short"
    ):
        source.image(1)
    path.unlink()
    with pytest.raises(UnreadableImageError, match="x.tar: 0001.jpg: expected a readable shard"):
        open_pickled = pickle.loads(pickle.dumps(source))
        open_pickled.image(1)


# ---- the index ----


def test_an_index_is_made_once(tmp_path: Path, jpegs, write_shard, monkeypatch) -> None:
    path = write_shard("x.tar", *samples(jpegs, ["cat", "dog"], "txt"))
    first = open_source(path)
    assert [file.suffix for file in (tmp_path / index_files.FOLDER).iterdir()] == [".npz"]
    made = []
    monkeypatch.setattr(index_files, "index_shard", lambda *a: made.append(a) or index_shard(*a))
    again = open_source(path)
    assert not made and again.summary == first.summary and source_fingerprint(again) == source_fingerprint(first)
    assert (again.image(1) == first.image(1)).all() and again.class_names == ["cat", "dog"]
    open_source(path, label_column="none")  # another choice has an index of its own
    assert len(made) == 1
    os.utime(path, ns=(0, 12345))
    open_source(path)
    assert len(made) == 2


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"x" * 500, None])
def test_a_damaged_index_is_made_again(tmp_path: Path, jpegs, write_shard, caplog, damage) -> None:
    path = write_shard("x.tar", *samples(jpegs, [1, 0]))
    open_source(path)
    (index,) = (tmp_path / index_files.FOLDER).iterdir()
    if damage is None:  # offsets beyond the end
        arrays = dict(np.load(index))
        arrays["offsets"] = arrays["offsets"] + 2**62
        np.savez(index, **arrays)
    else:
        index.write_bytes(damage)
    source = open_source(path)
    assert source.labels.tolist() == [1, 0] and source.image(1).shape == (48, 60, 3)
    assert f"{index}: expected the index of a shard, made again" in caplog.text


def test_an_index_lies_where_it_is_asked_for(tmp_path: Path, jpegs, write_shard) -> None:
    for place in ("one", "two"):
        write_shard(f"{place}/x.tar", *samples(jpegs, [0]))
        open_source(tmp_path / place, index_folder=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2 and not (tmp_path / "one" / index_files.FOLDER).exists()


def test_a_place_that_cannot_be_written_is_warned_of_once(tmp_path: Path, jpegs, write_shard, caplog) -> None:
    for number in range(2):
        write_shard(f"{number}.tar", *samples(jpegs, [0]))
    (tmp_path / "file").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert len(open_source(tmp_path / "{0..1}.tar", index_folder=tmp_path / "file" / "x")) == 2
    assert caplog.text.count("is not kept, name a folder for it (index_folder)") == 1


def test_a_source_goes_to_other_processes_and_threads(tmp_path: Path, jpegs, write_shard, monkeypatch) -> None:
    monkeypatch.setattr(shards, "_MOST_OPEN", 2)
    for number in range(5):
        write_shard(f"{number}.tar", *samples(jpegs, [0] * 4))
    source = open_source(tmp_path)
    source.image(0)
    sent = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: sent.image(i % 20), range(200)))
    assert all((picture == source.image(i % 20)).all() for i, picture in enumerate(read))
    assert len(sent._handles._open) == 2


def test_a_fingerprint_follows_the_data(tmp_path: Path, jpegs, write_shard) -> None:
    found = set()
    for labels, order in (([0, 1], jpegs), ([1, 0], jpegs), ([0, 1], jpegs[::-1])):
        path = write_shard("x.tar", *samples(order, labels))
        found |= {source_fingerprint(open_source(path)), source_fingerprint(open_source(path, apply_orientation=False))}
    assert len(found) == 6


def test_options_that_the_data_have_no_use_for(tmp_path: Path, jpegs, write_shard) -> None:
    path = write_shard("x.tar", *samples(jpegs, [0]))
    with pytest.raises(ValueError, match="root: expected nothing, since .*x.tar is webdataset shards, got there"):
        open_source(path, root="there")
    with pytest.raises(ValueError, match="label_column: expected 'cls', 'txt', 'json', .* got 'label'"):
        open_source(path, label_column="label")
    assert open_source(path, image_column="jpg").image(0).shape == (48, 60, 3)


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path, jpegs) -> None:
    add(tmp_path / "x.tar", ("\x1b[2Ja.jpg", b"none"), ("\x1b[2J.md", b"x"))
    source = open_source(tmp_path / "x.tar")
    assert source.summary.isprintable()
    with pytest.raises(UnreadableImageError) as error:
        source.image(0)
    assert str(error.value).isprintable()
