"""Data sets of Hugging Face's library: pictures by column, and their classes."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from alitok_fast.data import UnreadableImageError, open_source, read_image, source_fingerprint

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def save(tmp_path: Path, jpegs):
    """save({"train": [...]}, label=...) writes a data set with columns image and label to a folder."""

    def write(splits: dict[str, list] | list, label=None, **columns) -> Path:
        def made(values: list):
            pictures = [{"bytes": jpegs[i % 4], "path": f"{i}.jpg"} for i in range(len(values))]
            features = datasets.Features(
                {"image": datasets.Image(), "label": label or datasets.Value("int64"), **columns}
            )
            data = {"image": pictures, "label": values, **{name: pictures for name in columns}}
            return datasets.Dataset.from_dict(data, features=features)

        whole = (
            datasets.DatasetDict({k: made(v) for k, v in splits.items()}) if isinstance(splits, dict) else made(splits)
        )
        whole.save_to_disk(tmp_path / "set")
        return tmp_path / "set"

    return write


def test_pictures_and_class_labels(tmp_path: Path, save, jpegs) -> None:
    path = save({"train": [2, 0, 1], "test": [1]}, datasets.ClassLabel(names=["cat", "dog", "owl"]))
    source = open_source(path)
    assert source.class_names == ["cat", "dog", "owl"] and source.labels.tolist() == [2, 0, 1]
    assert source.name == "set/train" and open_source(path, "test").labels.tolist() == [1]
    (tmp_path / "one.jpg").write_bytes(jpegs[2])
    assert (source.image(2) == read_image(tmp_path / "one.jpg")).all() and source.sample_name(2) == "row 2"
    sent = pickle.loads(pickle.dumps(source))
    assert (sent.image(1) == source.image(1)).all() and len(pickle.dumps(source)) < 50_000
    with pytest.raises(ValueError, match="split: expected one of 'train', 'test', the splits of .*, got 'val'"):
        open_source(path, "val")


def test_names_as_labels_are_the_same_in_all_splits(save) -> None:
    path = save({"train": ["dog", "owl"], "val": ["owl", "cat"]}, datasets.Value("string"))
    train, val = open_source(path), open_source(path, "val")
    assert train.class_names == val.class_names == ["cat", "dog", "owl"]
    assert train.labels.tolist() == [1, 2] and val.labels.tolist() == [2, 0]


def test_numbers_as_labels(tmp_path: Path, save) -> None:
    path = save([2, 0, 0])
    assert open_source(path).class_names == ["0", "1", "2"]
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    assert open_source(path, class_names=tmp_path / "names.txt").class_names == ["cat", "dog", "owl"]
    assert open_source(path, label_column="none").class_names == ["set"]
    with pytest.raises(ValueError, match="split: expected 'train', since .* holds no splits, got 'val'"):
        open_source(path, "val")


def test_a_test_split_without_labels_is_no_class(save) -> None:
    path = save([1, -1, 0], datasets.ClassLabel(names=["cat", "dog"]))
    with pytest.raises(ValueError, match=r"1 sample whose label is out of range \(such as 'row 1'\)"):
        open_source(path)
    source = open_source(path, on_error="skip")
    assert source.labels.tolist() == [1, 0] and [source.sample_name(i) for i in range(2)] == ["row 0", "row 2"]


def test_columns_by_name(save) -> None:
    path = save([0, 1], None, mask=datasets.Image())
    with pytest.raises(
        ValueError, match="image_column: expected the name of a column, since .* has 2 of type Image: image"
    ):
        open_source(path)
    assert len(open_source(path, image_column="mask")) == 2
    with pytest.raises(ValueError, match="image_column: expected one of 'image', 'mask' in .*, got 'label'"):
        open_source(path, image_column="label")
    with pytest.raises(ValueError, match="label_column: expected one of .*'label'.*, got 'class'"):
        open_source(path, image_column="image", label_column="class")


def test_by_the_name_of_a_data_set(tmp_path: Path, jpegs, monkeypatch) -> None:
    """A folder of parquet is a data set by name as well."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, labels in (("train", [0, 1, 1]), ("test", [1])):
        pictures = [{"bytes": jpegs[i], "path": None} for i in range(len(labels))]
        features = datasets.Features({"photo": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        (tmp_path / "repo").mkdir(exist_ok=True)
        data = datasets.Dataset.from_dict({"photo": pictures, "label": labels}, features=features)
        data.to_parquet(tmp_path / "repo" / f"{split}.parquet")
    name = f"hf:{tmp_path / 'repo'}"
    for spec, split, labels in (
        (name, "train", [0, 1, 1]),
        (f"{name}:test", "train", [1]),
        (f"{name}:train[:2]", "train", [0, 1]),
    ):
        source = open_source(spec, split)
        assert source.labels.tolist() == labels and source.class_names == ["a", "b"]
    with pytest.raises(ValueError, match="data: expected a data set of Hugging Face at hf:.*nowhere, got"):
        open_source(f"hf:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="data: expected hf:NAME or hf:NAME:SPLIT, got 'hf:'"):
        open_source("hf:")


def test_pictures_elsewhere_and_missing_ones(tmp_path: Path, jpegs) -> None:
    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    pictures = [{"bytes": None, "path": str(tmp_path / "a.jpg")}, None, {"bytes": b"none", "path": None}]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures}, features=features).save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set")
    assert source.image(0).shape == (48, 60, 3) and source.class_names == ["set"]
    for index in (1, 2):
        with pytest.raises(UnreadableImageError, match=f"set: row {index}: expected a"):
            source.image(index)
    assert len(source_fingerprint(source)) == 16  # says nothing of what cannot be read
    assert len(open_source(tmp_path / "set", on_error="skip")) == 1


def test_fingerprints_and_sizes(save, jpegs) -> None:
    first = open_source(save([0, 1, 1]))
    assert first._sizes().tolist() == [len(jpegs[i]) for i in range(3)]
    assert source_fingerprint(first) == source_fingerprint(open_source(first._path))
    assert source_fingerprint(first) != source_fingerprint(open_source(save([0, 0, 1])))


def test_a_damaged_folder_is_named(tmp_path: Path, save) -> None:
    path = save([0, 1])
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="data: expected a data set of Hugging Face at .*set, got"):
        open_source(path)


def test_the_order_of_rows_is_that_of_a_shuffled_set(tmp_path: Path, jpegs) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    pictures = [{"bytes": jpegs[i], "path": None} for i in range(4)]
    data = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 2, 3]}, features=features)
    data.shuffle(seed=1).save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set")
    for index, label in enumerate(source.labels):
        assert source.encoded(index) == jpegs[label] and source._sizes()[index] == len(jpegs[label])
    assert np.bincount(source.labels).tolist() == [1, 1, 1, 1]
