"""Labels by name: exact, in another case or Unicode form, ambiguous, unknown; ImageNet's names."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch

from alitok_fast import Pipeline, save_model
from alitok_fast.pipelines.class_names import ClassNames, class_names_of, imagenet_class_names

NAMES = ["Cat", "cat", "crane", "dog", "crane", "e", "f", unicodedata.normalize("NFD", "café"), "7", "fire  truck"]


@pytest.fixture
def classes() -> ClassNames:
    return ClassNames(NAMES, 12)


@pytest.mark.parametrize(
    "label, expected",
    [
        ("cat", 1), ("Cat", 0), ("DOG", 3), (" e ", 5), (unicodedata.normalize("NFC", "café"), 7), ("7", 8), ("3", 3),
        ("fire truck", 9), (2, 2), (np.int64(3), 3), (torch.tensor(4), 4), (np.array(4), 4),
    ],
)  # fmt: skip
def test_one_class(classes, label, expected):
    assert classes.ids(label) == [expected] == classes.ids([label])


def test_several(classes):
    assert classes.ids(["dog", 2, np.int32(1)]) == [3, 2, 1]
    assert classes.ids(torch.tensor([1, 2])) == classes.ids(np.array([1, 2])) == classes.ids(range(1, 3)) == [1, 2]
    assert [classes[0], classes[-1], len(classes)] == ["Cat", "fire  truck", 10], "the named classes are all there are"


@pytest.mark.parametrize(
    "label, error, message",
    [
        ("crane", ValueError, r"got 'crane', the name of 2 \(crane\), 4 \(crane\)"),
        ("CAT", ValueError, r"got 'CAT', the name of 0 \(Cat\), 1 \(cat\)"),
        ("dogg", ValueError, r"expected a number in 0..9 or a class name, such as dog, \.\.\., got 'dogg'"),
        ("\x1b[31mbag", ValueError, r"got '\\\\x1b\[31mbag'"),
        (10, ValueError, r"expected values in \[0, 10\), got 10"),
        ("-1", ValueError, r"expected values in \[0, 10\), got -1"),
        ("--1", ValueError, r"expected a number in 0..9 or a class name, .*got '--1'"),
        ("9" * 5000, ValueError, r"expected a number in 0..9 or a class name, .*got '999"),
        (2.0, TypeError, "expected integers or names, got 2.0"),
        ([True], TypeError, "expected integers or names, got True"),
        (None, TypeError, "expected integers or names, got None"),
        (b"cat", TypeError, "expected integers or names, got b'cat'"),
    ],
)
def test_mistakes_are_named(classes, label, error, message):
    with pytest.raises(error, match=f"labels: .*{message}"):
        classes.ids(label)


def test_names_from_a_file_do_not_reach_the_terminal_as_they_are():
    with pytest.raises(ValueError) as caught:
        ClassNames(["\x1b]0;owned\x07bag" + "x" * 500], 1).ids("none")
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("names, error", [(list(range(10)), TypeError), (["a"] * 11, ValueError)])
def test_names_are_checked_when_the_pipeline_is_made(tiny_tokenizer, tiny_generator, names, error):
    with pytest.raises(error, match="class_names: expected"):
        Pipeline(tiny_tokenizer(), tiny_generator(), names)


def test_without_names():
    classes = ClassNames(None, 3)
    assert list(classes) == ["0", "1", "2"] and classes.ids("2") == [2]
    with pytest.raises(ValueError, match=r"expected a number in 0..2 \(this model has no class names\), got 'cat'"):
        classes.ids("cat")


def test_imagenet():
    names = imagenet_class_names()
    assert len(names) == len(set(names)) == 1000 and all(names)
    assert ClassNames(names, 1000).ids(["golden retriever", 281, "Tench"]) == [207, 281, 0]
    assert list(class_names_of("imagenet")) == list(names) and class_names_of("demo")[8] == "bag"


def test_a_generator_of_a_thousand_unnamed_classes_is_imagenet_s(tmp_path, tiny_tokenizer, tiny_generator):
    save_model(tmp_path / "tokenizer", tiny_tokenizer())
    save_model(tmp_path / "generator", tiny_generator(num_classes=1000))
    pipe = Pipeline.from_pretrained(tmp_path)
    assert pipe.label_ids(["golden retriever", 281]) == [207, 281]


def test_a_model_samples_the_classes_that_it_was_trained_on(tmp_path, tiny_tokenizer, tiny_generator):
    """Fine-tuned on 4 classes, a generator of 10 columns has 4."""
    save_model(tmp_path / "tokenizer", tiny_tokenizer())
    save_model(tmp_path / "generator", tiny_generator(), {"classes": ["a", "b", "c", "d"]})
    pipe = Pipeline.from_pretrained(tmp_path)
    assert len(pipe.classes) == 4
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 4\), got 4"):
        pipe([4])
