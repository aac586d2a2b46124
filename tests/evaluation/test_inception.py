"""Inception's features: torch-fidelity's own from the same file, and the layer of sFID as a plain restatement."""

from __future__ import annotations

import pickle
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from hostile import Touch
from torch import Tensor, nn
from torchvision_here import import_or_skip, smooth_pictures

from alitok_fast.evaluation.inception import Inception


def test_features_are_torch_fidelitys(inception_weights: Path) -> None:
    module = import_or_skip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = module.FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception_weights))
    images, inception = smooth_pictures(3), Inception(inception_weights)
    pooled, logits = theirs(images)
    got = inception(images)
    assert pooled.std(0).mean() > 0.01  # images differ
    torch.testing.assert_close(got.pooled, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.logits, logits, rtol=1e-4, atol=1e-5)
    assert (
        got.pooled.shape == (3, 2048) and got.logits.shape == (3, 1008) and inception.source == str(inception_weights)
    )


def test_spatial_features_are_seven_channels_of_mixed_6(inception_weights: Path) -> None:
    """mixed is Mixed_5b, so mixed_6 is Mixed_6d; its convolution `conv` is the branch of 1 x 1, after ReLU."""
    import_or_skip("torch_fidelity")
    inception, inputs = Inception(inception_weights), []
    network, images = inception._network, smooth_pictures(2)
    network.Mixed_6d.register_forward_pre_hook(lambda layer, given: inputs.append(given[0]))
    got = inception(images).spatial
    branch = network.Mixed_6d.branch1x1
    full = nn.functional.relu(branch.bn(branch.conv(inputs[0])))
    assert got.shape == (2, 2023) and full.shape == (2, 192, 17, 17)
    for place, value in (((0, 0, 0), 0), ((0, 1, 0), 7), ((1, 0, 3), 17 * 7 + 3), ((16, 16, 6), 2022)):
        row, column, channel = place
        torch.testing.assert_close(got[:, value], full[:, channel, row, column])
    assert not torch.equal(inception(smooth_pictures(3)[:2]).spatial, got)  # nothing of the call before


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 8, 8), TypeError, "images: expected uint8, got torch.float32"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ValueError, r"expected shape \(B, 3, H, W\), got \(1, 8, 8, 3\)"),
    ],
)
def test_other_images_are_refused(inception_weights: Path, images: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Inception(inception_weights)(images)


def test_other_files_are_refused(tmp_path: Path) -> None:
    import_or_skip("torch_fidelity")
    wrong = tmp_path / "wrong.pth"
    torch.save({"fc.weight": torch.zeros(1)}, wrong)
    with pytest.raises(
        ValueError, match=r"--inception: expected the weights of torch-fidelity's InceptionV3, got .*wrong"
    ):
        Inception(wrong, option="--inception")
    hostile, mark = tmp_path / "hostile.pth", tmp_path / "was here"
    hostile.write_bytes(pickle.dumps({"fc.weight": Touch(mark)}))
    with pytest.raises(ValueError, match="--inception: .*hostile.pth"):
        Inception(hostile, option="--inception")
    assert not mark.exists()


def test_without_a_network_the_file_is_named(tmp_path: Path, monkeypatch) -> None:
    import_or_skip("torch_fidelity")

    def refused(*arguments, **options):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refused)
    with pytest.raises(
        OSError, match=r"weights: expected weights-inception-2015-12-05-6726825d.pth, torch-fidelity's weights, in"
    ):
        Inception()


def test_a_missing_library_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"features need torch-fidelity, which .* pip install .*\[evaluate\]"):
        Inception()
