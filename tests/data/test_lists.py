"""Lists of pictures with their classes, ImageNet's layouts, and files that name the classes."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from alitok_fast.data import ListImages, UnreadableImageError, open_source
from alitok_fast.data.labels import read_class_names, read_list

WNIDS = ("n01440764", "n01443537", "n01484850")


@pytest.fixture
def put(tmp_path: Path, jpegs):
    """put("a/b.jpg") writes a photograph there, the same for the same name."""

    def write(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpegs[sum(name.encode()) % 4])

    return write


def labels(source) -> dict[str, str]:
    """The class of each picture, by name."""
    return {Path(source.sample_name(i)).name: source.class_names[source.labels[i]] for i in range(len(source))}


# ---- lists ----


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.txt", "a b/x.jpg 1\nc/y.jpg 0\n"),
        ("train.txt", "a b/x.jpg\t1\r\nc/y.jpg\t0"),
        ("train.csv", 'path,label\n"a b/x.jpg",1\nc/y.jpg,0\n'),
        ("train.csv", "\ufeffa b/x.jpg,1 10 20 30 40\nc/y.jpg,0\n"),
        ("train.tsv", "filename\tlabel\na b/x.jpg\t1\nc/y.jpg\t0\n"),
    ],
)
def test_forms_of_lists(tmp_path: Path, put, name: str, text: str) -> None:
    put("pictures/a b/x.jpg", "pictures/c/y.jpg")
    (tmp_path / name).write_text(text, encoding="utf-8")
    source = open_source(tmp_path / name, root=tmp_path / "pictures")
    assert source.labels.tolist() == [1, 0] and source.class_names == ["0", "1"] and source.name == name
    assert source.image(0).shape == (48, 60, 3) and source.sample_name(0) == "a b/x.jpg"


def test_names_are_classes_the_same_in_every_split(tmp_path: Path, put) -> None:
    put("x.jpg", "y.jpg", "z.jpg")
    (tmp_path / "set_train.txt").write_text("x.jpg n01484850\ny.jpg n01440764\n")
    (tmp_path / "set_val.txt").write_text("z.jpg n01484850\nx.jpg n01443537\n")
    train, val = open_source(tmp_path / "set_train.txt"), open_source(tmp_path / "set_val.txt")
    assert train.class_names == val.class_names == list(WNIDS)
    assert train.labels.tolist() == [2, 0] and val.labels.tolist() == [2, 1]
    with pytest.raises(ValueError, match="split: expected 'train', since .*set_val.txt is one list, got 'val'"):
        open_source(tmp_path / "set_val.txt", "val")


def test_a_file_names_the_classes(tmp_path: Path, put) -> None:
    put("x.jpg", "y.jpg")
    (tmp_path / "names.txt").write_text("".join(f"{wnid} fish {number}\n" for number, wnid in enumerate(WNIDS)))
    (tmp_path / "list.txt").write_text("x.jpg n01484850\ny.jpg n01440764\n")
    source = open_source(tmp_path / "list.txt", class_names=tmp_path / "names.txt")
    assert source.class_names == ["fish 0", "fish 1", "fish 2"] and source.labels.tolist() == [2, 0]
    (tmp_path / "list.txt").write_text("x.jpg n01484850\ny.jpg n99999999\n")
    with pytest.raises(ValueError, match=r"got 1 sample whose label is out of range \(such as 'y.jpg'\)"):
        open_source(tmp_path / "list.txt", class_names=tmp_path / "names.txt")


def test_paths_without_labels_are_one_class(tmp_path: Path, put) -> None:
    put("x.jpg", "y.jpg")
    (tmp_path / "list.txt").write_text("x.jpg\ny.jpg\n")
    source = open_source(tmp_path / "list.txt")
    assert source.class_names == ["list"] and source.labels.tolist() == [0, 0]


def test_listed_files_that_are_not_there(tmp_path: Path, put) -> None:
    put("x.jpg", "._y.jpg", "z.JPEG")
    (tmp_path / "list.txt").write_text("x.jpg 0\ngone.jpg 1\n._y.jpg 0\nz 1\n")
    with pytest.raises(
        ValueError, match=r"expected whole data .* 1 listed file that is not there \(such as 'gone.jpg'\)"
    ):
        open_source(tmp_path / "list.txt")
    source = open_source(tmp_path / "list.txt", on_error="skip")
    assert [path.name for path in source.paths] == ["x.jpg", "z.JPEG"] and "1 hidden or system name" in source.summary


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list.csv: expected lines of a path and a label, got none"),
        ("path,label\n", "list.csv: expected lines of a path and a label, got none"),
        ("a.jpg,1\nb.jpg,\n", r"list.csv: expected a path and a label in entry 2, got 'b.jpg,'"),
        ("a.jpg,1,2\n", r"list.csv: expected a path and a label in entry 1, got 'a.jpg,1,2'"),
        (b"\xff\xfe\0", "list.csv: expected a text file in UTF-8"),
        (
            "".join(f"{i}.jpg,{i}\n" for i in range(1, 201)),
            "expected a class in each line, got the running numbers 1 to 200",
        ),
    ],
)
def test_lists_that_are_none(tmp_path: Path, text, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "list.csv")


def test_numbers_and_names_are_not_mixed(tmp_path: Path, put) -> None:
    put("x.jpg", "y.jpg")
    (tmp_path / "list.txt").write_text("x.jpg 0\ny.jpg cat\n")
    with pytest.raises(ValueError, match="list.txt: expected labels of one kind, got numbers as well as names .*'cat'"):
        open_source(tmp_path / "list.txt")


def test_one_spelling_of_a_name(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    (tmp_path / "list.txt").write_text(f"x.jpg {forms[0]}\ny.jpg {forms[1]}\n", encoding="utf-8")
    assert {label for _, label in read_list(tmp_path / "list.txt")} == {"é"}


def test_unreadable_pictures_of_a_list(tmp_path: Path, put) -> None:
    put("x.jpg")
    (tmp_path / "y.jpg").write_bytes(b"none")
    (tmp_path / "list.txt").write_text("x.jpg 0\ny.jpg 1\n")
    with pytest.raises(UnreadableImageError, match="y.jpg: expected a readable image"):
        open_source(tmp_path / "list.txt").image(1)
    skipping = ListImages(tmp_path / "list.txt")
    skipping.drop_unreadable()
    assert skipping.labels.tolist() == [0]


def test_files_of_class_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("tench\ngreat white shark\n")
    assert read_class_names(path).keys == ["tench", "great white shark"]
    path.write_text("n01440764 tench, Tinca tinca\nn01443537\tgoldfish\n")
    assert read_class_names(path).names == ["tench, Tinca tinca", "goldfish"]
    for text, message in (
        ("", "expected class names, one per line, got none"),
        ("cat\ncat\n", "each class once, got 'cat'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"names.txt: .*{message}"):
            read_class_names(path)


# ---- ImageNet's layouts ----

VAL = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 5)]
CLASSES = dict(zip((f"{name}.JPEG" for name in VAL), (WNIDS[2], WNIDS[0], WNIDS[1], WNIDS[2]), strict=True))


@pytest.fixture
def imagenet(put):
    """imagenet("") writes train/nXXXXXXXX/*.JPEG and a flat val/ there."""

    def write(root: str = "") -> None:
        put(*(f"{root}train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(2)))
        put(*(f"{root}val/{name}" for name in CLASSES))

    return write


def devkit(path: Path) -> None:
    """A meta.mat with the classes in another order, and a branch of WordNet behind them."""
    io = pytest.importorskip("scipy.io")
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, "fish", "a fish", 0) for number, wnid in enumerate(reversed(WNIDS), 1)]
    io.savemat(path, {"synsets": np.array([*rows, (4, "n00001740", "entity", "", 3)], kinds)})


LISTS = {
    "val.txt": "".join(f"{name} {WNIDS.index(wnid)}\n" for name, wnid in CLASSES.items()),
    "val.csv": "".join(f"val/{name},{wnid}\n" for name, wnid in CLASSES.items()),
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"{name[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in reversed(CLASSES.items())),
    "imagenet_2012_validation_synset_labels.txt": "".join(f"{wnid}\n" for wnid in CLASSES.values()),
    "ILSVRC2012_validation_ground_truth.txt": "".join(f"{3 - WNIDS.index(wnid)}\n" for wnid in CLASSES.values()),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_flat_validation_set_has_its_classes_from_a_list(tmp_path: Path, imagenet, name: str) -> None:
    imagenet()
    (tmp_path / name).write_text(LISTS[name])
    devkit(tmp_path / "meta.mat")
    assert labels(open_source(tmp_path, "val")) == CLASSES
    assert labels(open_source(tmp_path, "val", labels=tmp_path / name)) == CLASSES
    train = open_source(tmp_path)
    assert train.class_names == list(WNIDS) and train.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_devkits_numbers_need_its_own_order(tmp_path: Path, imagenet) -> None:
    imagenet()
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n2\n3\n")
    with pytest.raises(
        ValueError, match="expected numbers from 0 to 2, in the order of the class folders, got 1 to 3; .*meta.mat"
    ):
        open_source(tmp_path, "val")
    (tmp_path / "meta.mat").write_bytes(b"MATLAB nonsense")
    with pytest.raises(ValueError, match="meta.mat: expected the meta.mat of ImageNet's devkit"):
        open_source(tmp_path, "val")


def test_a_flat_split_without_a_list_says_which_would_do(tmp_path: Path, imagenet) -> None:
    imagenet()
    with pytest.raises(
        ValueError, match="labels: expected class folders in .*val, .* or a list .*LOC_val_solution.csv.*got neither"
    ):
        open_source(tmp_path, "val")
    with pytest.raises(ValueError, match="labels: expected nothing, since folders name the classes in .*train"):
        open_source(tmp_path, labels=tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764\nn01443537\n", "expected 4 lines, one per picture in .*val, got 2"),
        ("other.JPEG 0\n", "expected a line for pictures such as 'ILSVRC2012_val_00000001.JPEG', got none for any"),
        (
            "".join(f"{name} {number}\n" for name, number in zip(VAL, (1, 2, 3, 1), strict=True)),
            "from 0 to 2, .* got 1 to 3",
        ),
        (
            f"{VAL[0]} n01440764\n{VAL[1]} n99999999\n{VAL[2]} 5\n{VAL[3]} -1\n",
            "3 samples whose labels are out of range",
        ),
    ],
)
def test_lists_that_do_not_fit(tmp_path: Path, imagenet, text: str, message: str) -> None:
    imagenet()
    (tmp_path / "val.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, "val")


def test_pictures_that_the_list_does_not_name_are_counted(tmp_path: Path, imagenet) -> None:
    imagenet()
    (tmp_path / "val.txt").write_text(f"{VAL[0]}.JPEG n01440764\n")
    summary = open_source(tmp_path, "val").summary
    assert "1 picture in 1 of 3 classes by val.txt; " in summary and "3 pictures that the list does not name" in summary


def test_kaggles_archive(tmp_path: Path, imagenet) -> None:
    imagenet("ILSVRC/Data/CLS-LOC/")
    (tmp_path / "LOC_val_solution.csv").write_text(LISTS["LOC_val_solution.csv"])
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} fish, {wnid[-1]}\n" for wnid in WNIDS))
    for place in (tmp_path, tmp_path / "ILSVRC" / "Data" / "CLS-LOC"):
        train, val = open_source(place), open_source(place, "val")
        assert train.class_names == val.class_names == ["fish, 4", "fish, 7", "fish, 0"]
        assert [WNIDS[label] for label in val.labels] == list(CLASSES.values())


def test_class_folders_get_the_names_of_a_file(tmp_path: Path, imagenet) -> None:
    imagenet()
    (tmp_path / "names.txt").write_text("n01443537 goldfish\nn01440764 tench\n")
    source = open_source(tmp_path, class_names=tmp_path / "names.txt")
    assert source.class_names == ["tench", "goldfish", "n01484850"] and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(
        ValueError, match="class_names: expected names of classes such as 'n01440764', got none of them in"
    ):
        open_source(tmp_path, class_names=tmp_path / "names.txt")
