"""Samples against references: the measures of their functions, several seeds, pairings, resuming."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from alitok_fast import Pipeline, SamplingParams
from alitok_fast.evaluation import comparison
from alitok_fast.evaluation.feature_folder import FeatureFolder
from alitok_fast.evaluation.image_sets import StoredImages
from alitok_fast.evaluation.moments import Moments
from alitok_fast.evaluation.networks import Network, load_network
from alitok_fast.evaluation.reference import Reference, read_reference
from alitok_fast.pipelines.bulk import BulkRun
from alitok_fast.pipelines.reference_statistics import reference_statistics
from alitok_fast.pipelines.sample_evaluation import DrawnImages, drawn_images, features_of, measure_samples, paired

FACTS = {"network": "toy", "weights": "abc", "resize": "none", "normalisation": "none", "library": "tests"}


def features(images: Tensor) -> dict[str, Tensor]:
    values = images.float() / 255
    return {"pooled": torch.cat([values.mean((2, 3)), values.std((2, 3))], 1)}


TOY = Network("toy", FACTS, False, torch.device("cpu"), features)


def images(path: Path, seed: int, count: int = 40, size: int = 8, least: int = 0) -> StoredImages:
    pixels = np.random.default_rng(seed).integers(least, 256, (count, size, size, 3), np.uint8)
    np.savez(path, arr_0=pixels)
    return StoredImages.open(path, 7)


def pixels_of(stored: StoredImages) -> Tensor:
    return torch.from_numpy(np.concatenate(list(stored.batches(0, stored.count))).transpose(0, 3, 1, 2).copy())


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    made = reference_statistics(images(tmp_path / "real.npz", 9, 60), TOY, tmp_path / "real", vectors=30)
    assert made is not None
    return made


# --- references -----------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_images_and_vectors_evenly_spaced(tmp_path: Path, reference: Reference) -> None:
    real = features(pixels_of(images(tmp_path / "again.npz", 9, 60)))["pooled"]
    expected = Moments.of(real)
    torch.testing.assert_close(reference.moments["pooled"].covariance, expected.covariance, rtol=1e-12, atol=1e-12)
    assert reference.vectors is not None and torch.equal(reference.vectors, real[::2])
    assert reference.facts["size"] == 8 and reference.facts["network"] == "toy" and "crop" not in reference.facts
    few = reference_statistics(images(tmp_path / "few.npz", 9, 5), TOY, tmp_path / "work", vectors=100)
    assert few is not None and few.vectors is not None and torch.equal(few.vectors, real[:5])
    none = reference_statistics(images(tmp_path / "few.npz", 9, 5), TOY, tmp_path / "work", vectors=0)
    assert none is not None and none.vectors is None


# --- measures -------------------------------------------------------------------------------------------------------


def test_measures_are_compares(tmp_path: Path, reference: Reference) -> None:
    drawn = images(tmp_path / "a.npz", 0, least=20)
    result = measure_samples([drawn], [(TOY, reference)], tmp_path / "work")
    folder = features_of(drawn, [TOY], tmp_path / "work")[0]
    expected = comparison.compare(folder, reference, inception=False)
    assert result is not None
    measures = result["measures"]["toy"]
    assert {name: found["mean"] for name, found in measures.items()} == {
        name: value for name, value in expected.items() if not name.endswith("_std")
    }
    assert measures["kernel_distance"]["std_of_parts"] == expected["kernel_distance_std"]
    assert "std" not in measures["frechet_distance"] and measures["frechet_distance"]["mean"] > 0.001
    assert result["sets"][0]["sha256"] == drawn.facts["sha256"] and result["sets"][0]["rounding"] == "as stored"
    assert result["networks"]["toy"] == FACTS and result["references"]["toy"]["counts"] == {"pooled": 60}
    assert [line.split(":")[0] for line in result["doubts"]] == [
        "the images are 40, published numbers are of 50,000",
        "the reference has 60 images",
    ]


def test_several_sets_have_mean_and_interval(tmp_path: Path, reference: Reference) -> None:
    sets = [images(tmp_path / f"{seed}.npz", seed, least=20) for seed in range(3)]
    result = measure_samples(sets, [(TOY, reference)], tmp_path / "work")
    assert result is not None
    found = result["measures"]["toy"]["frechet_distance"]
    alone = [measure_samples([one], [(TOY, reference)], tmp_path / "work") for one in sets]
    values = [one["measures"]["toy"]["frechet_distance"]["mean"] for one in alone if one is not None]
    assert found["values"] == values and found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["interval"] == pytest.approx(4.3027 * found["std"] / 3**0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"count": 20}, "images: expected sets of one count, got 20, 40"),
        ({"size": 9}, "images: expected sets of one size, got 8, 9"),
        ({"seed": 0}, "images: expected different sets, got one of them twice"),
    ],
)
def test_sets_that_do_not_belong_together(tmp_path: Path, reference: Reference, second: dict, message: str) -> None:
    sets = [images(tmp_path / "a.npz", 0), images(tmp_path / "b.npz", **{"seed": 1, **second})]
    with pytest.raises(ValueError, match=message):
        measure_samples(sets, [(TOY, reference)], tmp_path / "work")


def test_images_of_an_adm_file_give_precision_recall_and_kid(
    tmp_path: Path, inception_weights: Path, monkeypatch
) -> None:
    """All of the field's measures in one go. Roots of 2,048 x 2,048 numbers have tests of their own."""
    monkeypatch.setattr(
        comparison, "frechet_distance", lambda one, other: float((one.mean - other.mean).square().sum())
    )
    network = load_network("inception", inception_weights)
    real, drawn = images(tmp_path / "real.npz", 1, 6, 16), images(tmp_path / "drawn.npz", 2, 6, 16)
    got = network(pixels_of(real))
    moments = {name: Moments.of(got[name]) for name in ("pooled", "spatial")}
    arrays = {"mu": moments["pooled"].mean, "sigma": moments["pooled"].covariance}
    arrays |= {"mu_s": moments["spatial"].mean, "sigma_s": moments["spatial"].covariance}
    path = tmp_path / "adm.npz"
    np.savez(path, arr_0=pixels_of(real).numpy().transpose(0, 2, 3, 1), **{k: v.numpy() for k, v in arrays.items()})
    result = measure_samples([drawn], paired([network], [read_reference(path)]), tmp_path / "work", batch_size=4)
    assert result is not None
    measures = result["measures"]["inception"]
    assert list(measures) == ["fid", "sfid", "inception_score", "kid", "precision", "recall"]
    folder = features_of(drawn, [network], tmp_path / "work")[0]
    expected = comparison.compare(folder, Reference(moments), got["pooled"])
    assert {name: found["mean"] for name, found in measures.items()} == {
        name: pytest.approx(expected[name], rel=1e-3, abs=1e-6) for name in measures
    }
    assert any(line.startswith("Inception's weights are of a file") for line in result["doubts"])
    small = FeatureFolder(tmp_path / "small", 6, {"size": 8})
    assert "size: the images have 8, the reference has 16" in comparison.doubts(small, read_reference(path))


# --- pairing --------------------------------------------------------------------------------------------------------


def changed(**facts) -> Reference:
    return Reference({"pooled": Moments.of(torch.rand(9, 6))}, {**FACTS, **facts})


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([], "reference: expected one of toy's features, got none; `alitok-fast evaluate reference --data DATA --netw"),
        ([changed(), changed()], "reference: expected one for each network, got two of toy"),
        (
            [changed(network="inception")],
            "reference: expected statistics of the features of toy, got those of inception",
        ),
        ([changed(weights="def")], "reference: expected statistics of toy with weights abc, got def"),
        ([changed(resize="to 9")], "reference: expected statistics of toy with resize none, got to 9"),
        ([changed(normalisation="x")], "reference: expected statistics of toy with normalisation none, got x"),
    ],
)
def test_other_features_are_refused(references: list[Reference], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired([TOY], references)


def test_each_network_has_its_reference() -> None:
    second = dataclasses.replace(TOY, name="second", facts={**FACTS, "network": "second"})
    ours, theirs = changed(), changed(network="second", library="another release")
    assert paired([TOY, second], [theirs, ours]) == [(TOY, ours), (second, theirs)]
    with pytest.raises(ValueError, match="network: expected each once, got toy, toy"):
        paired([TOY, TOY], [ours])


def test_statistics_of_held_out_images_are_doubted(tmp_path: Path) -> None:
    network = dataclasses.replace(TOY, name="inception", facts={**FACTS, "network": "inception"})
    for name, expected in (("imagenet/val", True), ("imagenet/train", False)):
        held_out = changed(network="inception", images={"name": name})
        result = measure_samples([images(tmp_path / "a.npz", 0)], [(network, held_out)], tmp_path / "work")
        assert result is not None
        assert any("the reference is of the split imagenet/val" in line for line in result["doubts"]) == expected


# --- drawn images ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(tiny_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folder)


def test_drawn_images_are_those_of_sample(pipe: Pipeline, tmp_path: Path) -> None:
    """To the last bit, since batches have the borders of a large run, and chunks hold whole batches."""
    labels, params = [0, 1, 2] * 4, SamplingParams(guidance_scale=2.0)
    first, second = drawn_images(pipe, labels, params, [3, 4], 5)
    run = BulkRun(pipe, labels, tmp_path / "x.npz", SamplingParams(guidance_scale=2.0, seed=4), 5)
    run.sample()
    run.finish()
    with np.load(tmp_path / "x.npz") as arrays:
        drawn = arrays["arr_0"]
    assert np.array_equal(np.concatenate(list(second.batches(0, 12))), drawn)
    assert not np.array_equal(np.concatenate(list(first.batches(0, 12))), drawn)
    assert np.array_equal(np.concatenate(list(second.batches(5, 12))), drawn[5:])
    assert second.chunk == 1000 and drawn_images(pipe, labels, params, [0], 32)[0].chunk == 1024


def test_facts_have_all_that_decides_an_image(pipe: Pipeline) -> None:
    def facts(**changes) -> dict:
        given = {"labels": [0, 1], "params": SamplingParams(), "seeds": [0], "batch_size": 2, **changes}
        return dict(drawn_images(pipe, **given)[0].facts)

    plain = facts()
    assert plain["seed"] == 0 and plain["guidance_scale"] == 3.0 and len(plain["generator_fingerprint"]) == 16
    assert not {"device", "versions", "model", "class_names"} & plain.keys()
    others = [{"labels": [1, 0]}, {"params": SamplingParams(temperature=0.5)}, {"seeds": [1]}, {"batch_size": 1}]
    assert len({str(facts(**change)) for change in others} | {str(plain)}) == 5
    with pytest.raises(ValueError, match="seeds: expected different ones, got 1, 2, 1"):
        facts(seeds=[1, 2, 1])


def test_several_networks_draw_once_and_a_killed_run_goes_on(pipe: Pipeline, tmp_path: Path, monkeypatch) -> None:
    drawn: list[tuple[int, int]] = []
    batches = DrawnImages.batches

    def noted(self, begin: int, end: int):
        drawn.append((begin, end))
        return batches(self, begin, end)

    monkeypatch.setattr(DrawnImages, "batches", noted)
    monkeypatch.setattr(DrawnImages, "chunk", 4)
    (images_,) = drawn_images(pipe, [0, 1, 2] * 4, SamplingParams(), [0], 2)
    second = dataclasses.replace(TOY, name="second", facts={**FACTS, "network": "second"})
    calls: list[int] = []

    def stop_at_the_third(pixels: Tensor) -> dict[str, Tensor]:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return features(pixels)

    with pytest.raises(KeyboardInterrupt):
        features_of(images_, [TOY, dataclasses.replace(second, extract=stop_at_the_third)], tmp_path / "work")
    folders = features_of(images_, [TOY, second], tmp_path / "work")
    assert drawn == [(0, 4), (4, 8), (4, 8), (8, 12)]
    assert torch.equal(folders[0].vectors("pooled"), folders[1].vectors("pooled"))
    assert all(isinstance(folder, FeatureFolder) and folder.missing() == [] for folder in folders)
    (other,) = drawn_images(pipe, [0, 1, 2] * 4, SamplingParams(), [1], 2)
    assert features_of(other, [TOY], tmp_path / "work")[0].path != folders[0].path  # other images lie elsewhere
